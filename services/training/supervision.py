"""Handling of worker failures in Ray Train's controller: log messages and decisions.

Must not import torch: it runs in the controller's process.
"""

from __future__ import annotations

import re

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import RayTrainError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    ReschedulingState,
    RestartingState,
    ShuttingDownState,
    TrainControllerState,
)
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from pipelines.errors import BusyError, MongeError, RankError, RendezvousError, ServiceError
from services.training.progress import report_stage
from services.training.watch import positions

_MEMORY = re.compile(r"[\d.]+\w+ used / [\d.]+\w+ limit")

LONGEST = 300
"""Maximum length in characters of an error of another library in a message."""


class Supervision(ControllerCallback):
    """Reports why workers restart, and stops where Ray Train would retry forever.

    Args:
        max_failures: maximum number of failed starts of the workers.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failed_starts = 0

    def on_controller_start_worker_group(self, *, scaling_config: ScalingConfig, num_workers: int) -> None:
        """Check that the workers fit into the cluster; if not, the job service waits for nodes.

        Raises:
            ServiceError: the cluster is too small.
        """
        kind = "GPU" if scaling_config.use_gpu else "CPU"
        have = int(ray.cluster_resources().get(kind, 0))
        if have < num_workers:
            raise ServiceError(f"{num_workers} {kind}s required, the cluster has {have}")

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Report what happened to the workers.

        Raises:
            ServiceError: the number of failed starts exceeds ``workers.max_failures``.
        """
        if isinstance(current_state, RestartingState):
            why = "; ".join(reasons(current_state.training_failed_error))
            report_stage(f"{why}; restarting the workers from the latest checkpoint")
            _tell(positions())
        elif isinstance(current_state, ReschedulingState):
            self._not_started(current_state.training_failed_error)
        elif isinstance(current_state, ShuttingDownState):
            where = positions()  # reading deletes them
            if isinstance(current_state.next_state, ErroredState):
                _tell(where)

    def _not_started(self, error: TrainingFailedError) -> None:
        if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            report_stage("waiting for free resources for the workers")
            return
        self._failed_starts += 1
        (why,) = reasons(error)
        if self._failed_starts > self._max_failures:
            raise ServiceError(f"the workers failed to start {self._failed_starts} times: {why}")
        report_stage(f"the workers failed to start; retrying: {why}")


def _tell(lines: list[str]) -> None:
    if lines:
        print("\n".join(lines), flush=True)


def reasons(error: TrainingFailedError) -> list[str]:
    """Return short reasons of a failure, one for each group of ranks with the same reason.

    Failures caused by other failures come last.
    """
    ranks: dict[str, list[int]] = {}
    for rank, cause in causes_of(error).items():
        ranks.setdefault(_told(cause), []).append(rank)
    if not ranks:
        return [_told(cause_of(error))]
    return [f"rank{'s' * (len(same) > 1)} {', '.join(map(str, same))}: {told}" for told, same in ranks.items()]


def causes_of(error: TrainingFailedError) -> dict[int, BaseException]:
    """Return the error of each failed rank, root causes first; empty if no rank failed."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = {rank: cause_of(failure) for rank, failure in failures.items()}
    return dict(sorted(causes.items(), key=lambda one: (isinstance(one[1], RankError), one[0])))


def cause_of(error: BaseException) -> BaseException:
    """Return the error inside Ray's wrappers."""
    if isinstance(error, MongeError):
        return error
    for name in ("controller_failure", "health_check_failure", "cause", "__cause__"):
        if isinstance(inner := getattr(error, name, None), BaseException):
            return cause_of(inner)
    return error


def is_loss(error: TrainingFailedError) -> bool:
    """Return whether a process, a machine or a service failed, not the job itself."""
    causes = causes_of(error)
    if not causes:
        return isinstance(error, ControllerError)
    lost = RayActorError, OutOfMemoryError, RayTrainError, RankError, ServiceError, RendezvousError, BusyError
    return all(isinstance(cause, lost) for cause in causes.values())


def _told(cause: BaseException) -> str:
    if isinstance(cause, RayActorError):
        return _death(str(cause))
    if isinstance(cause, OutOfMemoryError):
        used = _MEMORY.search(str(cause))
        return "Ray killed it because its machine ran out of memory" + (f": {used[0]}" if used else "")
    text = str(cause.args[0]) if isinstance(cause, MongeError) else str(cause)
    return f"{type(cause).__name__}: {_brief(text)}" if text else type(cause).__name__


def _death(text: str) -> str:
    """Return Ray's message on a dead worker, without the list of ids."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("\t")]
    return _brief(" ".join(lines[1:] or lines))


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
