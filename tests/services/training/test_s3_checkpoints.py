"""Checkpoints, attempts and origins in S3, also with a failing server."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport
from runs import job, start, stripes

from pipelines.errors import CheckpointError, ObjectNotFoundError, StorageError, SupersededError
from pipelines.training.checkpoint import TENSORS, save_checkpoint, verify_checkpoint
from pipelines.training.state import TrainState
from services.settings import Settings
from services.storage.arrow import open_files
from services.storage.open import open_storage
from services.training.checkpoints import resumption
from services.training.config import WorkerConfig, jobs_address
from services.training.fencing import Fence
from services.training.origin import Origin, complete_checkpoints, find_origin
from services.training.uploads import LostCheckpoint, Uploads
from tests.services.storage.conftest import keys, moto_port, server
from tests.services.storage.faults import FaultyServer

__all__ = ["keys", "moto_port", "server"]

NAMES = [f"images-{images:012d}" for images in (32, 64, 96)]


@pytest.fixture
def settings(server: FaultyServer, tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path / "home", storage="s3://images/ours", s3_endpoint_url=server.url, s3_region="us-east-1",
        s3_path_style=True, s3_timeout=5, s3_attempts=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    return start(job("mlp"), stripes(tmp_path_factory.mktemp("stripes")))[1]


@pytest.fixture
def storage(settings: Settings) -> StorageContext:
    """Return Ray Train's storage context of a job."""
    files, path = open_files(jobs_address(settings), settings)
    return StorageContext(path, "job-1", files)


@pytest.fixture
def upload(storage: StorageContext, state: TrainState, tmp_path: Path) -> Callable[..., Checkpoint]:
    def upload(name: str, by: Callable[[Checkpoint, str], Checkpoint] | None = None) -> Checkpoint:
        save_checkpoint(state, tmp_path / "local")
        uploaded = (by or storage.persist_current_checkpoint)(Checkpoint.from_directory(str(tmp_path / "local")), name)
        shutil.rmtree(tmp_path / "local")
        return uploaded

    return upload


def test_the_latest_attempt_alone_may_write(settings: Settings) -> None:
    first, second = (Fence(jobs_address(settings), "job-1", number, settings) for number in (9, 10))
    first.claim()
    first.require()
    second.claim()
    for denied in (first.require, first.claim, first.require_if_seen):
        with pytest.raises(SupersededError, match="attempt 9 was superseded by attempt 10"):
            denied()
    assert (first.holds(), second.holds()) == (False, True)
    store = open_storage("s3://images/ours", settings)
    assert [found.key for page in store.pages() for found in page] == [
        "jobs/job-1/attempts/10",
        "jobs/job-1/attempts/9",
    ]


def test_a_look_that_fails_ends_nothing_and_is_made_again_at_the_next_checkpoint(
    settings: Settings, server: FaultyServer
) -> None:
    fence = Fence(jobs_address(settings), "job-1", 1, settings)
    fence.claim()
    server.faults.extend([500] * 2)
    fence.require_if_seen()
    assert not server.faults
    Fence(jobs_address(settings), "job-1", 2, settings).claim()
    server.requests = 0
    fence.require_if_seen()
    assert server.requests == 0
    server.faults.extend([500] * 4)
    with pytest.raises(StorageError, match="the server failed 2 times"):
        fence.require()
    assert not fence.holds()
    with pytest.raises(SupersededError):
        fence.require()


def test_a_bucket_that_is_not_there_is_told(settings: Settings) -> None:
    with pytest.raises(ObjectNotFoundError, match="bucket 'none-such' not found"):
        Fence("s3://none-such/jobs", "job-1", 1, settings).claim()


def test_checkpoints_of_another_job_are_found(settings: Settings, upload: Callable[..., Checkpoint]) -> None:
    jobs = jobs_address(settings)
    assert complete_checkpoints(jobs, "job-1", settings) == []
    with pytest.raises(CheckpointError, match="job-1 has no checkpoint in s3://images/ours/jobs"):
        find_origin(jobs, Origin("job-1"), settings)
    for name in (*NAMES[:2], "images-000000000064-2"):
        upload(name)
    open_storage(jobs, settings).write("job-1/images-000000000128", b"no folder")
    assert complete_checkpoints(jobs, "job-1", settings) == [*NAMES[:2], "images-000000000064-2"]
    assert find_origin(jobs, Origin("job-1"), settings) == (Origin("job-1", 64), "images-000000000064-2")
    assert complete_checkpoints(jobs, "job", settings) == []


def test_a_job_begins_with_the_checkpoint_of_another_one(
    settings: Settings, upload: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(NAMES[0])
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    with resumption(settings, Origin("job-1", 32)) as found:
        assert found.origin is not None
        verify_checkpoint(found.origin)
    assert not found.origin.exists(), "what was fetched is removed again"


@pytest.mark.parametrize("damage", ["a bit", "gone"])
def test_the_one_before_a_damaged_checkpoint_is_taken(
    settings: Settings,
    upload: Callable[..., Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    latest = [upload(name) for name in NAMES[:2]][-1]
    store = open_storage(jobs_address(settings), settings)
    store.write("job-1/checkpoint_manager_snapshot.json", json.dumps(NAMES[:2]).encode())
    if damage == "a bit":
        content = bytearray(store.read(f"job-1/{NAMES[1]}/{TENSORS}"))
        content[len(content) // 2] ^= 1
        store.write(f"job-1/{NAMES[1]}/{TENSORS}", bytes(content))
    else:
        latest.filesystem.delete_dir(latest.path)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: latest)
    with resumption(settings) as found:
        assert found.folder is not None
        verify_checkpoint(found.folder)
        assert found.name(64) == f"{NAMES[1]}-2"
    assert f"checkpoint {NAMES[1]} is damaged; training resumes from {NAMES[0]} instead" in capsys.readouterr().out


def test_an_upload_that_fails_is_told_and_the_next_one_counts(
    storage: StorageContext,
    server: FaultyServer,
    upload: Callable[..., Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    uploads = Uploads("s3://images/ours/jobs/job-1")

    async def follow() -> list[str]:
        manager = CheckpointManager(CheckpointConfig(num_to_keep=2), storage)

        def report(name: str) -> bool:
            uploads.expect(name)
            assert not uploads.stored(0)
            checkpoint = upload(name, uploads)
            sent: Any = pickle.loads(pickle.dumps(_TrainingReport(metrics={}, checkpoint=checkpoint, validation=False)))
            manager.after_report(sent, [{}])
            return uploads.stored(0)

        assert report(NAMES[0])
        server.faults.extend([503] * 100)
        save = storage.storage_filesystem
        assert save is not None
        monkeypatch.setattr(manager, "_write_state_to_storage", lambda: pytest.fail("nothing is counted"))
        assert not report(NAMES[1])
        server.faults.clear()
        monkeypatch.undo()
        monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-key")
        assert report(NAMES[2])
        return [str(one.checkpoint.path) for one in manager.best_checkpoint_results]

    assert asyncio.run(follow()) == [f"images/ours/jobs/job-1/{name}" for name in (NAMES[0], NAMES[2])]
    told = capsys.readouterr().out
    assert f"{NAMES[1]} could not be stored in s3://images/ours/jobs/job-1; earlier checkpoints are kept: " in told
    assert "secret-of-the-server" not in told
    assert not LostCheckpoint("a", storage.storage_filesystem)


def test_a_machine_with_a_home_of_its_own_keeps_to_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(known: Settings) -> Path:
        return WorkerConfig("job-1", {}, "data", known.for_workers(), "http://127.0.0.1:9").settings_here().home

    monkeypatch.setenv("MONGE_HOME", str(tmp_path / "own"))
    assert here(settings) == tmp_path / "own"
    assert here(settings.model_copy(update={"storage": None})) == tmp_path / "home"
    monkeypatch.delenv("MONGE_HOME")
    assert here(settings) == tmp_path / "home"
