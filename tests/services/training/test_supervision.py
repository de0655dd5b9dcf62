"""Messages and decisions after failures of workers, by the states of Ray Train's controller."""

from __future__ import annotations

import json

import pytest
import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    FinishedState,
    ReschedulingState,
    RestartingState,
    RunningState,
    ShuttingDownState,
    TrainControllerState,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipelines.errors import RankError, ServiceError
from services.training import supervision
from services.training.progress import MARK
from services.training.supervision import LONGEST, Supervision, is_loss, reasons

DEATH = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tpid: 7\n"
    "The actor is dead because its worker process has died."
)


def _lost() -> WorkerGroupError:
    dead = WorkerHealthCheckFailedError("a health check failed", RayActorError("a", DEATH))
    return WorkerGroupError("both", {0: RankError("rank 1 was lost"), 1: dead})


def test_the_rank_that_died_is_told_before_those_that_heard_of_it() -> None:
    assert reasons(_lost()) == [
        "rank 1: The actor is dead because its worker process has died.",
        "rank 0: RankError: rank 1 was lost",
    ]


def test_what_happened_to_several_ranks_is_said_once() -> None:
    text = "Memory on the node (IP: 127.0.0.1, ID: 7) was 13.83GB used / 23.54GB limit (0.587371)\nOOM kill reason: …"
    lost = WorkerGroupError("all", {rank: OutOfMemoryError(text) for rank in range(3)})
    assert reasons(lost) == [
        "ranks 0, 1, 2: Ray killed it because its machine ran out of memory: 13.83GB used / 23.54GB limit"
    ]
    assert is_loss(lost)


def test_long_errors_are_shortened() -> None:
    (told,) = reasons(WorkerGroupError("one", {0: ValueError("x " * 10_000)}))
    assert len(told) < LONGEST + 30


def test_an_error_of_the_code_is_no_loss() -> None:
    assert is_loss(_lost())
    assert is_loss(ControllerError(WorkerGroupStartupFailedError("died")))
    assert not is_loss(WorkerGroupError("both", {0: RankError("rank 1 failed"), 1: ValueError("a bug")}))


def test_a_restart_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    Supervision(3).after_controller_state_update(RunningState(), RestartingState(training_failed_error=_lost()))
    event = json.loads(capsys.readouterr().out.removeprefix(MARK))
    assert event["text"] == (
        "rank 1: The actor is dead because its worker process has died.; rank 0: RankError: rank 1 was lost; "
        "restarting the workers from the latest checkpoint"
    )


def test_starts_that_fail_are_bounded_and_a_lack_of_room_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    supervision = Supervision(1)
    full = ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(2)))
    failed = ReschedulingState(ControllerError(WorkerGroupStartupFailedError("a worker died")))
    for state in (full, full, full, failed):
        supervision.after_controller_state_update(RunningState(), state)
    told = [json.loads(line.removeprefix(MARK))["text"] for line in capsys.readouterr().out.splitlines()]
    assert told == ["waiting for free resources for the workers"] * 3 + [
        "the workers failed to start; retrying: WorkerGroupStartupFailedError: a worker died"
    ]
    with pytest.raises(ServiceError, match="failed to start 2 times: WorkerGroupStartupFailedError"):
        supervision.after_controller_state_update(RunningState(), failed)


def test_nothing_is_started_in_a_cluster_that_became_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0, "GPU": 2.0})
    Supervision(3).on_controller_start_worker_group(
        scaling_config=ScalingConfig(num_workers=2, use_gpu=True), num_workers=2
    )
    with pytest.raises(ServiceError, match="2 CPUs required, the cluster has 1"):
        Supervision(3).on_controller_start_worker_group(scaling_config=ScalingConfig(num_workers=2), num_workers=2)


@pytest.mark.parametrize(
    ("end", "told"), [(ErroredState(training_failed_error=_lost()), ["rank 0 was"]), (FinishedState(), [])]
)
def test_the_last_failure_shows_where_each_rank_was(
    end: TrainControllerState, told: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = [["rank 0 was"]]
    monkeypatch.setattr(supervision, "positions", taken.pop)
    Supervision(0).after_controller_state_update(RunningState(), ShuttingDownState(next_state=end))
    assert capsys.readouterr().out.splitlines() == told
    assert taken == [], "they are forgotten either way"
