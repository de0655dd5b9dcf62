"""Arguments of a job's workers, and handling of their results; Ray Train is replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from runs import job

from pipelines.errors import RankError, RendezvousError, ServiceError, TrainingError
from services.settings import Settings
from services.training import trainer
from services.training.config import staging_folder
from services.training.origin import Origin
from services.training.placement import placement_of


@pytest.fixture
def fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return a function that fits a job on a cluster with given resources and a given outcome of the workers."""

    def fit(outcome: Any, **resources: float) -> tuple[Any, dict[str, Any]]:
        made: dict[str, Any] = {}

        class Trainer:
            def __init__(self, function: Any, **options: Any) -> None:
                made.update(options)

            def fit(self) -> Any:
                staging_folder(settings, "job-1", 1).mkdir(parents=True)
                if isinstance(outcome, Exception):
                    raise outcome
                return SimpleNamespace(return_value=outcome)

        settings = Settings(home=tmp_path, mlflow_uri="http://127.0.0.1:9", rank_deadline=12.5)
        monkeypatch.setattr(trainer, "_Trainer", Trainer)
        spec = job("lenet")
        spec = spec.model_copy(update={"workers": spec.workers.model_copy(update={"count": 2})})
        try:
            placement = placement_of(spec.workers, resources)
            return trainer.fit("job-1", spec, "data", settings, placement, 1, Origin("job-0", 64)), made
        finally:
            assert not staging_folder(settings, "job-1", 1).exists()

    return fit


@pytest.mark.parametrize(
    ("resources", "backend", "workers", "gpu"),
    [
        ({"CPU": 2}, "gloo", 2, False),
        ({"CPU": 2, "GPU": 1}, "cpu:gloo,cuda:nccl", 1, True),
        ({"CPU": 2, "GPU": 4}, "cpu:gloo,cuda:nccl", 2, True),
    ],
)
def test_workers_take_what_there_is(
    fitted: Any, tmp_path: Path, resources: dict[str, float], backend: str, workers: int, gpu: bool
) -> None:
    outcome, made = fitted({"model": "a/1", "metrics": {}}, **resources)
    assert outcome == {"model": "a/1", "metrics": {}}
    assert (made["torch_config"].backend, made["torch_config"].timeout_s) == (backend, 13)
    assert (made["scaling_config"].num_workers, made["scaling_config"].use_gpu) == (workers, gpu)
    assert (made["run_config"].name, made["run_config"].storage_path) == ("job-1", str(tmp_path / "jobs"))
    assert made["run_config"].failure_config.max_failures == job("lenet").workers.max_failures
    assert (made["train_loop_config"]["job"], made["train_loop_config"]["origin"]) == ("job-1", "job-0@64")


def test_callbacks_that_start_a_process_for_nothing_are_left_out() -> None:
    ours, all_of_them = (
        {type(one).__name__ for one in kind(print)._create_default_callbacks()}
        for kind in (trainer._Trainer, TorchTrainer)
    )
    assert all_of_them - ours == trainer.UNNEEDED
    assert ours - all_of_them == {"Supervision"}


def test_an_error_that_workers_return_ends_the_job(fitted: Any) -> None:
    with pytest.raises(TrainingError, match="loss is nan") as raised:
        fitted({"error": "loss is nan", "hint": "lower it"}, CPU=2)
    assert raised.value.hint == "lower it"


def test_errors_of_the_job_end_it(fitted: Any) -> None:
    failed = WorkerGroupError("both", {0: RankError("rank 1 was lost"), 1: OSError("disk full")})
    with pytest.raises(TrainingError) as raised:
        fitted(failed, CPU=2)
    assert raised.value.args[0] == (
        "the workers of job-1 failed: rank 1: OSError: disk full; rank 0: RankError: rank 1 was lost"
    )
    assert raised.value.hint == "read `monge logs job-1`"


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (WorkerGroupError("both", {0: RankError("rank 1 was lost"), 1: RayActorError()}), "rank 1: The actor"),
        (ControllerError(WorkerGroupStartupFailedError("a worker died")), "WorkerGroupStartupFailedError: a worker"),
        (ControllerError(ServiceError("2 CPUs are needed")), "2 CPUs are needed"),
        (WorkerGroupError("one", {0: RendezvousError("rank 1 is missing")}), "RendezvousError: rank 1 is missing"),
    ],
)
def test_workers_that_are_lost_leave_the_job_to_another_attempt(fitted: Any, lost: Exception, told: str) -> None:
    with pytest.raises(ServiceError, match=told):
        fitted(lost, CPU=2)
