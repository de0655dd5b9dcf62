"""Valid values of ``MONGE_STORAGE``."""

from __future__ import annotations

import pytest

from pipelines.errors import SpecError
from services.settings import Settings, load_settings


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/a", "s3://my.bucket-1/a.b/c", "s3://bucket/a/b/"])
def test_an_address_in_s3_is_taken_and_carried_to_workers(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGE_STORAGE", address)
    settings = load_settings()
    assert settings.storage == address.rstrip("/")
    assert Settings(**settings.for_workers()).storage == settings.storage


@pytest.mark.parametrize(
    "address",
    [
        "",
        "bucket",
        "/data",
        "s3://",
        "s3://B",
        "s3:///a",
        "s3://bucket//a",
        "s3://bucket/../a",
        "s3://bucket/a/..",
        "gs://b",
    ],
)
def test_another_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGE_STORAGE", address)
    with pytest.raises(SpecError, match=r"MONGE_STORAGE: .* expected s3://bucket or s3://bucket/prefix"):
        load_settings()


def test_keys_in_the_address_are_refused_and_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGE_STORAGE", "s3://AKIDTEST:hidden-key@bucket/a")
    with pytest.raises(SpecError, match="pass keys in the environment or in a profile") as caught:
        load_settings()
    assert "hidden-key" not in str(caught.value)
    with pytest.raises(ValueError, match="pass keys") as raised:
        Settings()
    assert "hidden-key" not in str(raised.value)
