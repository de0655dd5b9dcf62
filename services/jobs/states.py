"""Where jobs and their attempts stand."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Of a job. The last three are final."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the job is over."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class AttemptStatus(StrEnum):
    """Of an attempt, as Ray Jobs tells it."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    UNKNOWN = "UNKNOWN"
    """The cluster answers and knows no such attempt."""

    @property
    def ended(self) -> bool:
        """Whether its driver is gone."""
        return self not in (AttemptStatus.PENDING, AttemptStatus.RUNNING)
