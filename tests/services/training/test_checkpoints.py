"""The checkpoint from which a run resumes if the latest is damaged, and how Ray Train handles the next one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ranks import run_ranks
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport
from runs import job, start, stripes

from pipelines.errors import CheckpointError
from pipelines.training.checkpoint import NUMBERS, TENSORS, save_checkpoint, verify_checkpoint
from pipelines.training.state import TrainState
from services.settings import Settings
from services.training import checkpoints
from services.training.checkpoints import Resumption, resumption
from services.training.origin import Origin
from services.training.trainer import CHECKPOINTS_KEPT


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "one bit of the tensors": lambda folder: flip_a_bit(folder / TENSORS),
    "one bit of the numbers": lambda folder: flip_a_bit(folder / NUMBERS),
    "tensors cut short": lambda folder: os.truncate(folder / TENSORS, 200),
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "numbers that are no JSON": lambda folder: (folder / NUMBERS).write_text("{"),
    "an empty folder": lambda folder: [file.unlink() for file in folder.iterdir()],
    "no folder": lambda folder: shutil.rmtree(folder),
}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    return start(job("mlp"), stripes(tmp_path_factory.mktemp("stripes")))[1]


@pytest.fixture
def kept(tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder of a job with checkpoints at 32 and 64 images and other files; Ray Train provides the latter."""
    folder = tmp_path / "jobs" / "job-1"
    for name in ("images-000000000032", "images-000000000064"):
        save_checkpoint(state, folder / name)
    for name in ("images-", "checkpoint-1", "images-000000000016-x"):
        (folder / name).mkdir()
    count(folder, "images-000000000032", "images-000000000064")
    hand_over(monkeypatch, folder / "images-000000000064")
    return folder


def count(folder: Path, *names: str) -> None:
    """Write Ray Train's list of registered checkpoints."""
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps({"checkpoint_results": results}))


def hand_over(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: Checkpoint.from_directory(str(folder)))


def resumed() -> Resumption:
    with resumption() as found:
        if found.folder is not None:
            verify_checkpoint(found.folder)
        return found


def test_the_first_start_has_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    assert resumed() == Resumption()
    assert Resumption().name(64) == "images-000000000064"


def test_the_latest_checkpoint_is_taken(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = resumed()
    assert found.folder == kept / "images-000000000064"
    assert found.name(96) == "images-000000000096"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", DAMAGE)
def test_the_one_before_a_damaged_checkpoint_is_taken(
    kept: Path, name: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Covers checkpoints on disk, and in storage from which they are downloaded first."""
    DAMAGE[name](kept / "images-000000000064")
    if elsewhere:
        storage = SubTreeFileSystem(str(kept.parent), LocalFileSystem())
        latest = Checkpoint("job-1/images-000000000064", storage)
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda: latest)
    found = resumed()
    assert found.folder is not None
    assert elsewhere != found.folder.is_relative_to(kept)
    assert elsewhere != found.folder.exists(), "what was fetched is removed again"
    if not elsewhere:
        assert found.folder.name == "images-000000000032"
    (line,) = capsys.readouterr().out.splitlines()
    assert "checkpoint images-000000000064 is damaged; training resumes from images-000000000032 instead: " in line


def test_damaged_checkpoints_are_passed_over_from_the_newest_on(
    kept: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(state, kept / "images-000000000064-2")
    save_checkpoint(state, kept / "images-000000000008")
    hand_over(monkeypatch, kept / "images-000000000064-2")
    count(kept, "images-000000000032", "images-000000000064", "images-000000000064-2")
    for name in ("images-000000000064-2", "images-000000000064", "images-000000000032"):
        flip_a_bit(kept / name / TENSORS)
    found = resumed()
    assert found.folder == kept / "images-000000000008"
    assert [found.name(images) for images in (16, 32, 64)] == [
        "images-000000000016",
        "images-000000000032-2",
        "images-000000000064-3",
    ]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_where_none_is_whole_the_error_is_that_of_the_latest(kept: Path) -> None:
    for name in ("images-000000000032", "images-000000000064"):
        flip_a_bit(kept / name / TENSORS)
    with pytest.raises(CheckpointError, match="images-000000000064: the tensors do not match their hash"):
        resumed()


def test_a_checkpoint_after_the_latest_is_never_taken(kept: Path, state: TrainState) -> None:
    """Its upload was interrupted, or Ray Train ended before it registered the checkpoint: it is written again."""
    save_checkpoint(state, kept / "images-000000000096")
    flip_a_bit(kept / "images-000000000064" / TENSORS)
    found = resumed()
    assert found.folder == kept / "images-000000000032"
    assert (found.name(64), found.name(96)) == ("images-000000000064-2", "images-000000000096")


def test_storage_that_does_not_answer_is_no_damage(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise OSError("the network is unreachable")

    monkeypatch.setattr(Checkpoint, "as_directory", away)
    with pytest.raises(OSError, match="the network is unreachable"):
        resumed()


def test_other_ranks_take_what_the_first_has_found(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "rank", lambda: 1)
    monkeypatch.setattr(checkpoints, "from_first_rank", lambda _: "images-000000000032")
    monkeypatch.setattr(checkpoints, "verify_checkpoint", lambda _: pytest.fail("the first rank does that"))
    with resumption() as found:
        assert found.folder == kept / "images-000000000032"


def begun(jobs: Path, origin: Origin) -> Resumption:
    with resumption(Settings(home=jobs.parent), origin) as found:
        return found


def test_a_first_start_takes_the_checkpoint_of_its_origin(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    for origin, name in ((Origin("job-1"), "images-000000000064"), (Origin("job-1", 32), "images-000000000032")):
        assert begun(kept.parent, origin) == Resumption(origin=kept / name)
    # Another rank uses the given checkpoint without verification.
    monkeypatch.setattr(checkpoints, "rank", lambda: 1)
    monkeypatch.setattr(checkpoints, "from_first_rank", lambda _: "images-000000000032")
    monkeypatch.setattr(checkpoints, "verify_checkpoint", lambda _: pytest.fail("the first rank does that"))
    assert begun(kept.parent, Origin("job-1")) == Resumption(origin=kept / "images-000000000032")


def test_a_damaged_checkpoint_of_an_origin_is_refused(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    flip_a_bit(kept / "images-000000000064" / TENSORS)
    with pytest.raises(CheckpointError, match="images-000000000064: the tensors do not match their hash"):
        begun(kept.parent, Origin("job-1", 64))


def test_a_checkpoint_of_the_job_itself_goes_before_its_origin(kept: Path) -> None:
    found = begun(kept.parent, Origin("job-0", 32))
    assert (found.folder, found.origin) == (kept / "images-000000000064", None)


class Keeper:
    """The part of Ray Train that registers checkpoints and deletes old ones; created again for each start."""

    def __init__(self, home: Path, state: TrainState) -> None:
        self._home = home
        self._state = state
        self._start()

    def _start(self) -> None:
        self.storage = StorageContext(str(self._home / "jobs"), "job-1")
        self.manager = CheckpointManager(CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT), self.storage)

    def restart(self, monkeypatch: pytest.MonkeyPatch) -> Resumption:
        self._start()
        assert self.manager.latest_checkpoint_result is not None
        latest = self.manager.latest_checkpoint_result.checkpoint
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda: latest)
        return resumed()

    def report(self, name: str) -> None:
        local = self._home / "local"
        save_checkpoint(self._state, local)
        there = self.storage.persist_current_checkpoint(Checkpoint.from_directory(str(local)), name)
        shutil.rmtree(local)
        self.manager.register_checkpoint(_TrainingReport(metrics={}, checkpoint=there, validation=False))

    @property
    def kept(self) -> list[str]:
        folder = self._home / "jobs" / "job-1"
        counted = json.loads((folder / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
        names = sorted(file.name for file in folder.iterdir() if file.is_dir())
        assert names == sorted(entry["checkpoint_dir_name"] for entry in counted)
        return names


@pytest.mark.parametrize("between", [False, True])
def test_ray_train_keeps_what_follows_a_damaged_checkpoint(
    tmp_path: Path, state: TrainState, between: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would delete a new checkpoint with the name of the damaged one together with the latter."""

    async def follow() -> None:
        keeper = Keeper(tmp_path, state)
        for images in (32, 64):
            keeper.report(Resumption().name(images))
        flip_a_bit(tmp_path / "jobs" / "job-1" / "images-000000000064" / TENSORS)
        found = keeper.restart(monkeypatch)
        assert found.folder is not None
        assert found.folder.name == "images-000000000032"
        if between:  # the run is stopped before it comes to where the damaged one was written
            keeper.report(found.name(48))
            found = keeper.restart(monkeypatch)
        for images in (64, 96):
            keeper.report(found.name(images))
        assert keeper.kept == ["images-000000000064-2", "images-000000000096"]
        found = keeper.restart(monkeypatch)
        assert found.folder is not None
        assert found.folder.name == "images-000000000096"
        for name in keeper.kept:
            verify_checkpoint(tmp_path / "jobs" / "job-1" / name)

    asyncio.run(follow())


@pytest.mark.slow
def test_two_ranks_take_the_same_and_report_together(kept: Path, tmp_path: Path) -> None:
    flip_a_bit(kept / "images-000000000064" / TENSORS)
    folder = tmp_path / "ranks"
    folder.mkdir()
    data = stripes(tmp_path / "stripes")
    first, second = run_ranks(data.address, kept / "images-000000000064", folder)
    assert first["taken"] == second["taken"] == str(kept / "images-000000000032")
    assert first["told"] == [[16, "images-000000000016", False], [32, "images-000000000032-2", True]]
    assert [(images, held) for images, _, held in second["told"]] == [(16, False), (32, False)]
