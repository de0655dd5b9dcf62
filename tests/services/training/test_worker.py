"""A worker: its arguments in another process, and a job run on it, without Ray and MLflow."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import ray.train
import torch
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from ray.train import Checkpoint
from runs import job, stripes

from pipelines.data.loader import ShardedDataset
from pipelines.distributed import agree
from pipelines.errors import ServiceError
from pipelines.evaluation.result import Evaluation
from pipelines.models.bundle import Bundle
from pipelines.training.checkpoint import NUMBERS, TENSORS, save_checkpoint
from pipelines.training.state import TrainState
from services.settings import Settings
from services.tracking.entries import LogEntry, Point
from services.training import worker
from services.training.config import WorkerConfig, staging_folder
from services.training.worker import train_worker


@pytest.mark.parametrize("shard_cache", [None, Path("local")])
def test_settings_reach_workers_in_another_folder(
    shard_cache: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = Settings(
        s3_endpoint_url="http://127.0.0.1:9", s3_path_style=True, shard_cache=shard_cache, shard_cache_gib=0.5
    )
    told = settings.for_workers()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("elsewhere"))
        patched.setenv("MONGE_S3_ENDPOINT_URL", "http://127.0.0.1:8")
        there = Settings(**told)
        assert there.shards != Settings().shards
    assert there.shards == settings.shards
    assert (there.s3_endpoint_url, there.s3_path_style, there.shard_cache_gib) == ("http://127.0.0.1:9", True, 0.5)


@dataclass
class Followed:
    """Calls of a run to MLflow and Ray Train."""

    kept: Path
    run_id: str = "f00d"
    experiment_id: str = "1"
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    reports: list[tuple[dict[str, Any], str, bool]] = field(default_factory=list)
    registered: list[int] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    again: list[LogEntry] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    agreeing: int = 0
    away: int = 0
    """Number of calls at the end for which MLflow is not available."""
    fault: Exception = field(default_factory=lambda: ConnectionError("refused"))
    stops: bool = False
    """Whether the run is asked to stop."""
    listens: bool = False

    def __enter__(self) -> Self:
        self.listens = True
        return self

    def __exit__(self, *_: object) -> None:
        self.listens = False

    @property
    def asked(self) -> bool:
        assert self.listens
        return self.stops

    def tag(self, name: str, value: str) -> None:
        self.tags[name] = value

    def metrics(self, values: dict[str, float], images: int) -> None:
        self.points.append((images, values))

    def pictures(self, evaluation: Evaluation, images: int) -> None:
        assert evaluation.metrics

    @contextmanager
    def agree(self, place: str) -> Iterator[None]:
        self.agreeing += 1
        try:
            with agree(place):
                yield
        finally:
            self.agreeing -= 1

    def unsent(self) -> list[LogEntry]:
        return [Point(name, value, images, 0) for images, values in self.points for name, value in values.items()]

    def send_again(self, entries: Sequence[LogEntry]) -> None:
        self.again += entries

    def flush(self, timeout: float) -> None:
        self._reach()

    def close(self, status: str, timeout: float = 0.0) -> None:
        self._reach()
        self.status.append(status)

    def _reach(self) -> None:
        assert self.agreeing == 0, "other ranks would wait for MLflow"
        if self.away:
            self.away -= 1
            raise ServiceError("MLflow is away") from self.fault

    def report(
        self,
        metrics: dict[str, Any],
        *,
        checkpoint: Any,
        checkpoint_dir_name: str,
        checkpoint_upload_fn: Callable[[Any, str], Any],
        **_: Any,
    ) -> None:
        self.reports.append((metrics, checkpoint_dir_name, checkpoint is not None))
        if checkpoint is not None:
            assert checkpoint_upload_fn(checkpoint, checkpoint_dir_name) is checkpoint

    def persist_current_checkpoint(self, checkpoint: Any, name: str) -> Any:
        """Persist a checkpoint like Ray Train's storage."""
        shutil.copytree(checkpoint.path, self.kept / name, dirs_exist_ok=True)
        return checkpoint

    def register(self, run: Any, folder: str, name: str, alias: str, *, images: int, **_: Any) -> str:
        assert run is self
        self._reach()
        assert Bundle.load(Path(folder)).classes == ("0", "1")
        self.registered.append(images)
        return f"{name}/1"


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Followed:
    """Replace MLflow and Ray Train, in a process that is the only rank."""
    found = Followed(tmp_path / "kept")
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: found))
    monkeypatch.setattr(worker.Run, "later", lambda *_, on_open: on_open(found) or found)
    monkeypatch.setattr(worker, "register", found.register)
    monkeypatch.setattr(worker, "StopRequest", lambda first: found)
    monkeypatch.setattr(worker, "agree", found.agree)
    monkeypatch.setattr(worker, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(worker, "configure_process", lambda: None)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray.train, "report", found.report)
    return found


def config_of(tmp_path: Path, data: ShardedDataset, **train: Any) -> dict[str, Any]:
    spec = job("lenet", images=96, checkpoint_every=32, evaluate_every=64, log_every=32, **train)
    settings = Settings(home=tmp_path, mlflow_uri="http://127.0.0.1:9")
    return WorkerConfig.of("job-1", spec, data.address, settings).carried()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return stripes(tmp_path_factory.mktemp("stripes"), side=16)


def test_the_end_of_a_job_waits_for_mlflow_and_registers_once(
    tmp_path: Path, data: ShardedDataset, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(worker.time, "sleep", pauses.append)
    followed.away = 3
    assert train_worker(config_of(tmp_path, data))["model"] == "a-lenet/1"
    assert (followed.status, followed.registered, len(pauses)) == (["FINISHED"], [96], 3)


def test_what_mlflow_refuses_is_not_waited_for(tmp_path: Path, data: ShardedDataset, followed: Followed) -> None:
    followed.away, followed.fault = 1, MlflowException("no such name", error_code=INVALID_PARAMETER_VALUE)
    with pytest.raises(ServiceError, match="MLflow is away"):
        train_worker(config_of(tmp_path, data))


def test_a_checkpoint_keeps_what_had_not_been_sent(
    tmp_path: Path, data: ShardedDataset, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_worker(config_of(tmp_path, data))
    kept = Checkpoint.from_directory(followed.kept / "images-000000000064")
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: kept)
    shutil.rmtree(followed.kept / "images-000000000096")
    train_worker(config_of(tmp_path, data))
    assert {entry.images for entry in followed.again if isinstance(entry, Point)} == {32, 64}


def test_a_stopped_worker_does_not_wait_for_mlflow(tmp_path: Path, data: ShardedDataset, followed: Followed) -> None:
    followed.stops, followed.away = True, 1
    assert train_worker(config_of(tmp_path, data)) == {"stopped": 16, "saved": True}


def test_a_worker_that_is_asked_to_stop_registers_nothing(
    tmp_path: Path, data: ShardedDataset, followed: Followed
) -> None:
    followed.stops = True
    assert train_worker(config_of(tmp_path, data)) == {"stopped": 16, "saved": True}
    assert [name for _, name, _ in followed.reports] == ["images-000000000016"]
    assert (followed.status, followed.registered, followed.listens) == (["KILLED"], [], False)


def test_a_worker_trains_tells_keeps_and_registers(tmp_path: Path, data: ShardedDataset, followed: Followed) -> None:
    outcome = train_worker(config_of(tmp_path, data))
    assert outcome["model"] == "a-lenet/1"
    assert 0 <= outcome["metrics"]["test_accuracy"] <= 1
    assert [name for _, name, held in followed.reports if held] == [f"images-{n:012d}" for n in (32, 64, 96)]
    assert [report["images"] for report, _, _ in followed.reports] == [32, 64, 96]
    assert [images for images, values in followed.points if "loss" in values] == [32, 64, 96]
    assert [images for images, values in followed.points if "test_accuracy" in values] == [64, 96]
    assert (followed.registered, followed.status) == ([96], ["FINISHED"])


def test_a_worker_goes_on_from_a_checkpoint_with_the_same_bits(
    tmp_path: Path, data: ShardedDataset, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_worker(config_of(tmp_path, data))
    again = Followed(tmp_path / "again")
    resume(again, followed.kept / "images-000000000064", monkeypatch)
    train_worker(config_of(tmp_path, data))
    assert [report["images"] for report, _, _ in again.reports] == [96]
    last = "images-000000000096/state.safetensors"
    assert (again.kept / last).read_bytes() == (followed.kept / last).read_bytes()


def resume(again: Followed, folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace MLflow and Ray Train again, for a start with or without a checkpoint."""
    monkeypatch.setattr(worker.Run, "later", lambda *_, on_open: again)
    monkeypatch.setattr(worker, "register", again.register)
    monkeypatch.setattr(ray.train, "report", again.report)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: again))
    checkpoint = None if folder is None else Checkpoint.from_directory(str(folder))
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: checkpoint)


def test_a_worker_begins_with_the_checkpoint_of_another_job(
    tmp_path: Path, data: ShardedDataset, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more images at a constant rate, the bits equal those of one run; a restart uses its own checkpoint."""
    followed.kept = tmp_path / "jobs" / "job-0"
    config, more = config_of(tmp_path, data), config_of(tmp_path, data)
    config["spec"]["optimizer"]["schedule"] = more["spec"]["optimizer"]["schedule"] = "constant"
    more["spec"]["train"]["images"] = 160
    train_worker(config)
    whole, again = Followed(tmp_path / "whole"), Followed(tmp_path / "again")
    resume(whole, None, monkeypatch)
    train_worker(more)
    resume(again, None, monkeypatch)
    assert train_worker(more | {"origin": "job-0@64"})["model"] == "a-lenet/1"
    assert [report["images"] for report, _, _ in again.reports] == [96, 128, 160]
    assert (again.tags, again.again) == ({"monge.from": "job-0@64"}, [])
    newest = "images-000000000160"
    assert (again.kept / newest / TENSORS).read_bytes() == (whole.kept / newest / TENSORS).read_bytes()
    assert (again.kept / newest / NUMBERS).read_bytes() == (whole.kept / newest / NUMBERS).read_bytes()
    last = Followed(tmp_path / "last")
    resume(last, again.kept / "images-000000000128", monkeypatch)
    shutil.rmtree(followed.kept)
    train_worker(more | {"origin": "job-0@64"})
    assert ([report["images"] for report, _, _ in last.reports], last.tags) == ([160], {})


def test_an_origin_that_does_not_fit_ends_the_job(
    tmp_path: Path, data: ShardedDataset, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed.kept = tmp_path / "jobs" / "job-0"
    train_worker(config_of(tmp_path, data))
    resume(Followed(tmp_path / "again"), None, monkeypatch)
    config = config_of(tmp_path, data) | {"origin": "job-0@96"}
    assert train_worker(config)["hint"] == "raise train.images above 96"
    config["spec"]["train"]["images"] = 160
    config["spec"] |= {"model": {"kind": "mlp", "hidden": [16]}}
    assert " of the classifier is " in train_worker(config)["error"]
    assert "job-0@300 does not exist" in train_worker(config | {"origin": "job-0@300"})["error"]


def test_a_worker_passes_over_a_damaged_checkpoint_and_ends_with_the_same_bits(
    tmp_path: Path,
    data: ShardedDataset,
    followed: Followed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_worker(config_of(tmp_path, data))
    names = [name for _, name, _ in followed.reports]
    (followed.kept / "checkpoint_manager_snapshot.json").write_text(json.dumps(names[:2]))
    os.truncate(followed.kept / names[1] / TENSORS, 200)
    again = Followed(tmp_path / "again")
    resume(again, followed.kept / names[1], monkeypatch)
    assert train_worker(config_of(tmp_path, data))["model"] == "a-lenet/1"
    assert [name for _, name, _ in again.reports] == [f"{names[1]}-2", names[2]]
    assert (again.kept / names[2] / TENSORS).read_bytes() == (followed.kept / names[2] / TENSORS).read_bytes()
    assert f"checkpoint {names[1]} is damaged; training resumes from {names[0]} instead" in capsys.readouterr().out


def test_a_checkpoint_of_another_spec_ends_the_job_though_an_older_one_fits(
    tmp_path: Path, data: ShardedDataset, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_worker(config_of(tmp_path, data))
    other = Followed(tmp_path / "other")
    resume(other, None, monkeypatch)
    train_worker(config_of(tmp_path, data, ema_half_life=40))
    newest = "images-000000000064"
    shutil.rmtree(followed.kept / newest)
    shutil.copytree(other.kept / newest, followed.kept / newest)
    again = Followed(tmp_path / "again")
    resume(again, followed.kept / newest, monkeypatch)
    outcome = train_worker(config_of(tmp_path, data))
    assert f"{newest}: of spec " in outcome["error"]
    assert again.reports == []


def test_what_would_happen_again_is_returned_and_all_else_raised(
    tmp_path: Path, data: ShardedDataset, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, data)
    config["spec"]["optimizer"]["learning_rate"] = 1e30
    outcome = train_worker(config)
    assert "loss is" in outcome["error"]
    assert "learning_rate" in outcome["hint"]
    assert train_worker(config_of(tmp_path / "away", data) | {"data": str(tmp_path / "nowhere")})["error"]
    assert followed.registered == []

    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(worker, "save_checkpoint", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train_worker(config_of(tmp_path, data))


def full_at(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a disk that becomes full while the checkpoint at ``images`` is written."""

    def save(state: TrainState, folder: Path) -> None:
        save_checkpoint(state, folder)
        if state.images == images:
            (folder / NUMBERS).unlink()
            raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(worker, "save_checkpoint", save)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(
    tmp_path: Path,
    data: ShardedDataset,
    followed: Followed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    full_at(64, monkeypatch)
    assert train_worker(config_of(tmp_path, data))["model"] == "a-lenet/1"
    assert [(report["images"], held) for report, _, held in followed.reports] == [(32, True), (64, False), (96, True)]
    assert all("loss" in report for report, _, _ in followed.reports)
    for lines in (capsys.readouterr().out, caplog.text):
        assert "no space left on device" in lines
    assert all((folder / NUMBERS).exists() for folder in staging_folder(Settings(home=tmp_path), "job-1", 0).iterdir())


def test_a_run_whose_last_checkpoint_cannot_be_written_ends_as_others(
    tmp_path: Path,
    data: ShardedDataset,
    followed: Followed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full_at(96, monkeypatch)
    assert train_worker(config_of(tmp_path, data))["model"] == "a-lenet/1"
    assert "the checkpoint at image 96 could not be written" in capsys.readouterr().out


def test_a_run_that_cannot_save_when_it_is_to_stop_says_so(
    tmp_path: Path, data: ShardedDataset, followed: Followed, capsys: pytest.CaptureFixture[str]
) -> None:
    staging = staging_folder(Settings(home=tmp_path), "job-1", 0)
    staging.parent.mkdir(parents=True)
    staging.write_text("no folder can be made here")
    followed.stops = True
    assert train_worker(config_of(tmp_path, data)) == {"stopped": 16, "saved": False}
    assert [(report["images"], held) for report, _, held in followed.reports] == [(16, False)]
    assert "the checkpoint at image 16 could not be written" in capsys.readouterr().out
