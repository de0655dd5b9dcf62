"""A damaged list of checkpoints, or one that names a checkpoint that is missing, keeps no job from going on."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from runs import job, start, stripes

from pipelines.errors import CheckpointError
from pipelines.training.checkpoint import NUMBERS, TENSORS, save_checkpoint
from services.settings import Settings
from services.training.checkpoints import Resumption, resumption
from services.training.origin import FILES
from services.training.snapshot import SNAPSHOT, counted, mend
from services.training.uploads import Uploads

LOCAL = LocalFileSystem()
NAMES = ("images-000000000032", "images-000000000064")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder of a job with two checkpoints that Ray Train has not registered."""
    folder = tmp_path / "jobs" / "job-1"
    state = start(job("mlp"), stripes(tmp_path / "stripes"))[1]
    for name in NAMES:
        save_checkpoint(state, folder / name)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    return folder


def listed(folder: Path) -> dict[str, Any]:
    """Return Ray Train's list with both checkpoints."""
    storage = StorageContext(str(folder.parent), folder.name)
    manager = CheckpointManager(CheckpointConfig(num_to_keep=2), storage)
    document: dict[str, Any] = json.loads(manager._save_state())
    document["checkpoint_results"] = [{"checkpoint_dir_name": name, "metrics": {}} for name in NAMES]
    document["checkpoint_report_indices"] = [0, 1]
    document["latest_checkpoint_result"] = document["checkpoint_results"][-1]
    return document


def test_what_is_whole_stays(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mend(LOCAL, str(kept))
    text = json.dumps(listed(kept))
    (kept / SNAPSHOT).write_text(text)
    mend(LOCAL, str(kept))
    assert (kept / SNAPSHOT).read_text() == text
    assert counted(LOCAL, str(kept)) == set(NAMES)
    assert capsys.readouterr().out == ""


def test_ray_train_starts_though_a_checkpoint_is_gone(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kept / SNAPSHOT).write_text(json.dumps(listed(kept)))
    shutil.rmtree(kept / NAMES[1])
    mend(LOCAL, str(kept))
    storage = StorageContext(str(kept.parent), kept.name)
    manager = CheckpointManager(CheckpointConfig(num_to_keep=2), storage)
    assert manager.latest_checkpoint_result is not None
    assert "checkpoint images-000000000064 is missing" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_list_that_was_cut_short_is_put_aside(kept: Path, cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    (kept / SNAPSHOT).write_text(json.dumps(listed(kept))[:cut])
    mend(LOCAL, str(kept))
    assert not (kept / SNAPSHOT).exists()
    assert (kept / f"{SNAPSHOT}.damaged").exists()
    assert "the list of checkpoints is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(("damaged", "taken"), [((), NAMES[1]), (NAMES[1:], NAMES[0])])
def test_the_latest_whole_checkpoint_is_taken_without_a_list(
    kept: Path, tmp_path: Path, damaged: tuple[str, ...], taken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in damaged:
        (kept / name / TENSORS).write_bytes(b"x")
    with resumption(Settings(home=tmp_path), job="job-1") as found:
        assert found.folder == kept / taken
        assert found.taken == frozenset()
    assert all(f"checkpoint {name} is damaged" in capsys.readouterr().out for name in damaged)


def test_where_none_is_whole_the_job_does_not_begin_anew(kept: Path, tmp_path: Path) -> None:
    for name in NAMES:
        (kept / name / TENSORS).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=NAMES[1]), resumption(Settings(home=tmp_path), job="job-1"):
        pass


@pytest.mark.parametrize("file", [TENSORS, NUMBERS])
def test_a_first_checkpoint_that_was_cut_short_is_none(kept: Path, tmp_path: Path, file: str) -> None:
    shutil.rmtree(kept / NAMES[0])
    (kept / NAMES[1] / file).unlink()
    with resumption(Settings(home=tmp_path), job="job-1") as found:
        assert found == Resumption()
    assert set(FILES) == {TENSORS, NUMBERS}


def test_a_full_disk_costs_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "jobs" / "job-1" / NAMES[0]

    def full(checkpoint: Checkpoint, name: str) -> None:
        there.mkdir(parents=True)
        (there / TENSORS).write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "no space left on device")

    storage = SimpleNamespace(
        persist_current_checkpoint=full,
        build_checkpoint_path_from_name=lambda name: str(there.parent / name),
        storage_filesystem=LOCAL,
    )
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    uploads = Uploads(str(there.parent))
    uploads.expect(NAMES[0])
    assert not uploads(Checkpoint.from_directory(str(tmp_path)), NAMES[0])
    assert not uploads.stored(0)
    assert not there.exists()
    assert "could not be stored in" in capsys.readouterr().out
