"""Output of ``monge doctor`` if nothing runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.platform import doctor
from services.settings import Settings


def _examined(home: Path) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.check_machine(Settings(home=home))}


def test_packages_are_there_and_services_are_not(tmp_path: Path) -> None:
    found = _examined(tmp_path)
    assert found["torch"].ok
    assert not found["endpoint"].ok
    assert found["endpoint"].hint == "monge up"


def test_a_missing_package_has_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    finding = _examined(tmp_path)["no-such-package"]
    assert not finding.ok
    assert finding.hint == "pip install no-such-package"


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE_GIB", 10**9)
    finding = _examined(tmp_path)[f"disk of {tmp_path}"]
    assert not finding.ok
    assert "MONGE_HOME" in finding.hint
