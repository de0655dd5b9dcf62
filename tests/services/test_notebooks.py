"""The notebooks of ``examples/`` run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGE_HOME", str(tmp_path / "home"))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    manager = client.create_kernel_manager()
    manager.transport, manager.ip = "ipc", str(tmp_path / "kernel")
    client.execute()


def test_there_are_three_with_their_pictures() -> None:
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs), path.name
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs), path.name
