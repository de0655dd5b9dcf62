"""Conversion of database rows to the types of the API and the policy."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pipelines.spec import WorkersSpec
from services.jobs import policy
from services.jobs.documents import Attempt, Event, Job, JobProgress
from services.jobs.states import State
from services.jobs.tables import AttemptRow, EventRow, JobRow, TokenRow
from services.tokens import Role, Token
from services.tracking.pages import run_page
from services.training.placement import Placement


def time_of(reported: dict[str, Any], now: float) -> float:
    """Return the time of a report; now if the report has none."""
    at = reported.get("at")
    return float(at) if isinstance(at, int | float) else now


def progress_of(attempt: AttemptRow, images: int, total: int, at: float, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the progress of an attempt, as stored in the row of the job."""
    assert attempt.first_at is not None
    assert attempt.first_images is not None
    seconds, seen = at - attempt.first_at, images - attempt.first_images
    rate = seen / seconds if seconds > 0 and seen > 0 else None
    numbers = {str(name): value for name, value in metrics.items() if isinstance(value, int | float)}
    progress = JobProgress(
        images=images,
        total=total,
        images_per_second=rate,
        seconds_left=(total - images) / rate if rate else None,
        metrics=numbers,
    )
    return progress.model_dump()


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _maybe(seconds: float | None) -> datetime | None:
    return None if seconds is None else _when(seconds)


def job_of(row: JobRow) -> Job:
    """Return a job; the link to its run is relative to the address of MLflow."""
    run = run_page(row.experiment_id, row.run_id) if row.experiment_id and row.run_id else None
    return Job(
        id=row.id,
        number=row.number,
        name=row.name,
        kind=row.kind,
        state=State(row.state),
        reason=row.reason,
        since=_when(row.since),
        submitted=_when(row.submitted),
        started=_maybe(row.first_started),
        ended=_maybe(row.ended),
        owner=row.owner,
        priority=row.priority,
        labels=row.labels,
        timeout=row.timeout,
        attempts=row.attempts or 0,
        progress=None if row.progress is None else JobProgress(**row.progress),
        run_id=row.run_id,
        run_url=run,
        model=row.model,
        origin=row.origin,
    )


def attempt_of(row: AttemptRow) -> Attempt:
    """Return an attempt."""
    return Attempt(
        number=row.number,
        started=_when(row.started),
        ended=_maybe(row.ended),
        outcome=row.outcome,
        message=row.message,
    )


def open_attempt_of(row: AttemptRow, reached: int | None) -> policy.AttemptView:
    """Return an attempt that has not ended, for the policy; its status on the cluster is added later.

    Args:
        row: row of the attempt.
        reached: number of images that earlier attempts had seen.
    """
    beyond = row.first_images if reached is None else reached
    return policy.AttemptView(
        number=row.number,
        placement=Placement(row.workers, row.gpu),
        started=row.started,
        sent=row.sent,
        stage=row.stage,
        trains=row.trains,
        progressed=row.images is not None and row.images > (beyond or 0),
        error=row.error,
        stopping=row.stopping,
        message=row.message or "",
    )


def unfinished_of(row: Any, attempt: policy.AttemptView | None) -> policy.JobView:
    """Return a job that has not ended, for the policy."""
    return policy.JobView(
        id=row.id,
        number=row.number,
        workers=WorkersSpec.model_validate(row.workers),
        state=State(row.state),
        submitted=row.submitted,
        reason=row.reason,
        priority=row.priority,
        cancelled=row.cancelled_by,
        timeout=row.timeout,
        first_started=row.first_started,
        attempt=attempt,
        attempts=row.attempts,
        setbacks=row.setbacks,
        not_before=row.not_before,
    )


def event_of(row: EventRow) -> Event:
    """Return an event."""
    return Event(
        id=row.id,
        at=_when(row.at),
        attempt=row.attempt,
        kind=row.kind,
        text=row.text,
        state=None if row.state is None else State(row.state),
    )


def token_of(row: TokenRow) -> Token:
    """Return a token."""
    return Token(
        name=row.name,
        role=Role(row.role),
        created=_when(row.created),
        revoked=_maybe(row.revoked),
        requests_per_second=row.requests_per_second,
        max_jobs=row.max_jobs,
    )
