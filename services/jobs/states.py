"""States of jobs and attempts."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """State of a job. The last three are final."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class AttemptStatus(StrEnum):
    """Status of an attempt in Ray Jobs."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    UNKNOWN = "UNKNOWN"
    """The cluster is reachable and does not know the attempt."""

    @property
    def ended(self) -> bool:
        """Whether the driver of the attempt has ended."""
        return self not in (AttemptStatus.PENDING, AttemptStatus.RUNNING)
