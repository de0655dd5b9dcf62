"""Persistent state of the job service: jobs, attempts, events and tokens, in SQLite or PostgreSQL."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from pipelines.errors import BusyError, ConflictError, JobNotFoundError
from pipelines.spec import JobSpec
from services.jobs import policy
from services.jobs.database import open_database
from services.jobs.documents import (
    Event,
    Job,
    JobDetails,
    JobPage,
    NewToken,
    Submission,
    TokenRequest,
)
from services.jobs.rows import (
    attempt_of,
    event_of,
    job_of,
    open_attempt_of,
    progress_of,
    time_of,
    token_of,
    unfinished_of,
)
from services.jobs.states import State
from services.jobs.tables import AttemptRow, EventRow, JobRow, SettingRow, TokenRow
from services.tokens import FRESH, Token
from services.training.origin import Origin
from services.training.placement import Placement

QUEUE_SEEN = 200
"""Maximum number of queued jobs that the policy considers; those behind them cannot start yet."""

_SEEN = (
    *("id", "number", "workers", "state", "submitted", "reason", "priority", "cancelled_by", "timeout"),
    *("first_started", "attempts", "setbacks", "not_before"),
)

_DRAINING = "draining"

# These list the states to find, not the states to exclude, so that the database can use an index.
_UNFINISHED = [state.value for state in State if not state.final]
_ON_THE_CLUSTER = [state for state in _UNFINISHED if state != State.QUEUED]


@dataclass(frozen=True)
class Untracked:
    """A job whose state is not yet marked in its MLflow run."""

    job: str
    run_id: str
    state: State
    reason: str


class JobStore:
    """Access to the tables, with one method per query and per change.

    Args:
        url: SQLAlchemy URL: ``sqlite:////folder/jobs.db`` or ``postgresql+psycopg://user@host/database``.
        now: clock, in seconds since 1970.

    Raises:
        ServiceError: the database cannot be opened.
    """

    def __init__(self, url: str, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._engine = open_database(url)
        self._writing = self._engine.execution_options(writes=True)
        # The SQLite driver polls a locked database with pauses of up to 0.1 s; this lock avoids that in one process.
        self._turn = threading.Lock() if self._engine.dialect.name == "sqlite" else nullcontext()
        self._tokens = _KnownTokens()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with Session(self._engine) as session:
            yield session

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with self._turn, Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    # Jobs

    def submit(
        self, spec: JobSpec, submission: Submission, owner: Token, key: str | None, origin: Origin | None = None
    ) -> tuple[Job, bool]:
        """Store a new job with the state ``queued``.

        Args:
            spec: spec of the job.
            submission: submission as received.
            owner: token of the owner.
            key: idempotency key: a second request of the owner with this key returns the first job.
            origin: checkpoint of another job to start from.

        Returns:
            The job, and whether it is new.

        Raises:
            ConflictError: the key was used for another request.
            BusyError: the owner has reached the limit of unfinished jobs.
        """
        without = {"origin"} if submission.origin is None else set()  # compatible with digests of earlier versions
        # Aliases may have moved since the first request with this key.
        asked = spec.with_versions(lambda _: "")
        digest = _digest(submission.model_dump_json(exclude=without) + asked.fingerprint())
        try:
            with self._write() as session:
                if (earlier := _by_key(session, owner.name, key)) is None:
                    self._require_room(session, owner)
                    row = self._new_job(spec, submission, owner.name, key, digest)
                    row.origin = None if origin is None else str(origin)
                    session.add(row)
                    session.flush()
                    _note(session, row, self._now(), "state", f"submitted by {owner.name}", State.QUEUED)
                    return job_of(row), True
        except IntegrityError:  # a concurrent request with this key was first
            with self._read() as session:
                earlier = _by_key(session, owner.name, key)
            if earlier is None:
                raise
        if earlier.request_digest != digest:
            raise ConflictError(
                f"Idempotency-Key: {key!r} was used for another request, which created {earlier.id}",
                hint="use a new key",
            )
        return job_of(earlier), False

    def _new_job(self, spec: JobSpec, submission: Submission, owner: str, key: str | None, digest: str) -> JobRow:
        now = self._now()
        return JobRow(
            id=f"{spec.name}-{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}",
            name=spec.name,
            kind=spec.objective.kind,
            spec=spec.model_dump(mode="json"),
            workers=spec.workers.model_dump(mode="json"),
            owner=owner,
            idempotency_key=key,
            request_digest=digest,
            priority=submission.priority,
            turn=policy.turn(submission.priority, now),
            timeout=submission.timeout,
            labels=submission.labels,
            submitted=now,
            state=State.QUEUED.value,
            reason="not scheduled yet",
            since=now,
        )

    def _require_room(self, session: Session, owner: Token) -> None:
        unfinished = session.scalar(
            select(sa.func.count()).where(JobRow.owner == owner.name, JobRow.state.in_(_UNFINISHED))
        )
        if (unfinished or 0) >= owner.max_jobs:
            raise BusyError(
                f"{owner.name} has {unfinished} unfinished jobs, which is the limit",
                hint="wait until a job ends, or cancel one",
                retry_after=60.0,
            )

    def job(self, job: str) -> JobDetails:
        """Return a job with its attempts and its spec.

        Raises:
            JobNotFoundError: no job has this id.
        """
        with self._read() as session:
            row = _row(session, job)
            attempts = session.scalars(select(AttemptRow).where(AttemptRow.job == job).order_by(AttemptRow.number))
            return JobDetails(**dict(job_of(row)), attempt_list=[attempt_of(one) for one in attempts], spec=row.spec)

    def page(
        self,
        *,
        states: Sequence[State] = (),
        owner: str | None = None,
        name: str | None = None,
        labels: dict[str, str] | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> JobPage:
        """Return jobs, newest first.

        Args:
            states: only jobs in these states.
            owner, name: only jobs of this owner, or with this name.
            labels: only jobs with all these labels.
            before: only jobs submitted before the job with this number.
            limit: maximum number of jobs.
        """
        query = select(JobRow).order_by(JobRow.number.desc()).limit(limit + 1)
        if states:
            query = query.where(JobRow.state.in_([state.value for state in states]))
        if owner is not None:
            query = query.where(JobRow.owner == owner)
        if name is not None:
            query = query.where(JobRow.name == name)
        for label, value in (labels or {}).items():
            query = query.where(JobRow.labels[label].as_string() == value)
        if before is not None:
            query = query.where(JobRow.number < before)
        with self._read() as session:
            rows = list(session.scalars(query))
        more = rows[limit - 1].number if len(rows) > limit else None
        return JobPage(jobs=[job_of(row) for row in rows[:limit]], next=more)

    def state(self, job: str) -> State:
        """Return the state of a job.

        Raises:
            JobNotFoundError: no job has this id.
        """
        with self._read() as session:
            return State(_row(session, job).state)

    def counts(self) -> dict[State, int]:
        """Return the number of jobs in each state."""
        with self._read() as session:
            rows = session.execute(select(JobRow.state, sa.func.count()).group_by(JobRow.state))
            return {State(state): count for state, count in rows}

    def events(self, job: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """Return the events of a job after event ``after``, oldest first.

        Raises:
            JobNotFoundError: no job has this id.
        """
        with self._read() as session:
            _row(session, job)
            query = select(EventRow).where(EventRow.job == job, EventRow.id > after).order_by(EventRow.id).limit(limit)
            return [event_of(row) for row in session.scalars(query)]

    def cancel(self, job: str, who: str) -> Job:
        """Request cancellation of a job; a job that has ended is not changed.

        Raises:
            JobNotFoundError: no job has this id.
        """
        with self._write() as session:
            row = _row(session, job)
            if not State(row.state).final and row.cancelled_by is None:
                row.cancelled_by = who
                _note(session, row, self._now(), "state", f"{who} requested cancellation", None)
            return job_of(row)

    def retry(self, job: str, who: str) -> Job:
        """Queue a failed or cancelled job again; it resumes from its last checkpoint.

        Raises:
            JobNotFoundError: no job has this id.
            ConflictError: the job has not ended, or has succeeded.
        """
        with self._write() as session:
            row = _row(session, job)
            if row.state not in (State.FAILED, State.CANCELLED):
                raise ConflictError(f"job {job} is {row.state}", hint="only a failed or cancelled job can be retried")
            row.cancelled_by = row.ended = row.first_started = None
            row.setbacks, row.not_before = 0, 0.0
            self._move(session, row, State.QUEUED, f"queued again by {who}")
            return job_of(row)

    # Methods for the controller

    def unfinished(self, queue: int = QUEUE_SEEN) -> list[policy.JobView]:
        """Return the jobs that have not ended, for the policy; the status of their attempts is not known yet.

        Args:
            queue: maximum number of queued jobs, from the front of the queue.
        """
        jobs = select(*(getattr(JobRow, name) for name in _SEEN))
        queued, others = JobRow.state == State.QUEUED, JobRow.state.in_(_ON_THE_CLUSTER)
        with self._read() as session:
            rows = list(session.execute(jobs.where(others)))
            rows += session.execute(jobs.where(queued, JobRow.cancelled_by.is_not(None))).all()
            first = jobs.where(queued, JobRow.cancelled_by.is_(None)).order_by(JobRow.turn.desc(), JobRow.number)
            rows += session.execute(first.limit(queue)).all()
            open_attempts = session.scalars(
                select(AttemptRow).join(JobRow).where(JobRow.state.in_(_UNFINISHED), AttemptRow.ended.is_(None))
            )
            attempts = _seen_by_the_policy(session, open_attempts.all())
        return [unfinished_of(row, attempts.get(row.id)) for row in rows]

    def open_attempt(self, job: str) -> policy.AttemptView:
        """Return the attempt of a job that has not ended, for the policy."""
        with self._read() as session:
            return _seen_by_the_policy(session, [_open_row(session, job)])[job]

    def move(self, moves: Sequence[policy.Move]) -> None:
        """Change the states or reasons of jobs."""
        with self._write() as session:
            for move in moves:
                self._move(session, _row(session, move.job), move.state, move.reason)

    def start(self, job: str, placement: Placement, reason: str) -> int:
        """Store the next attempt of a job and return its number."""
        with self._write() as session:
            row = _row(session, job)
            row.attempts += 1
            row.first_started = row.first_started or self._now()
            session.add(
                AttemptRow(
                    job=job,
                    number=row.attempts,
                    workers=placement.workers,
                    gpu=placement.gpu,
                    started=self._now(),
                )
            )
            self._move(session, row, State.RECOVERING if row.attempts > 1 else State.STARTING, reason)
            return row.attempts

    def sent(self, job: str) -> None:
        """Record that the cluster has accepted the attempt."""
        with self._write() as session:
            attempt = _open_row(session, job)
            attempt.sent, attempt.started = True, self._now()

    def stopping(self, job: str) -> None:
        """Record that the attempt was asked to stop."""
        with self._write() as session:
            _open_row(session, job).stopping = True

    def end_attempt(self, action: policy.EndAttempt, message: str) -> None:
        """Close the attempt of a job and change the state of the job."""
        with self._write() as session:
            row, attempt = _row(session, action.job), _open_row(session, action.job)
            attempt.ended, attempt.outcome, attempt.message = self._now(), action.outcome, message
            row.setbacks, row.not_before = action.setbacks, action.not_before
            self._move(session, row, action.state, action.reason)

    def spec(self, job: str) -> tuple[str, str | None, dict[str, str]]:
        """Return the spec of a job as JSON, its origin, and its metadata for the cluster."""
        with self._read() as session:
            row = _row(session, job)
            metadata = {"job": row.id, "name": row.name, "kind": row.kind, "owner": row.owner}
            return json.dumps(row.spec), row.origin, metadata

    def read_of(self, job: str, number: int) -> int:
        """Return the number of bytes of the log of an attempt whose events were stored."""
        query = select(AttemptRow.read).where(AttemptRow.job == job, AttemptRow.number == number)
        with self._read() as session:
            return int(session.scalars(query).one())

    def report(self, job: str, number: int, read: int, events: Sequence[dict[str, Any]]) -> None:
        """Store events that an attempt reported in its log.

        Args:
            job: id of the job.
            number: number of the attempt.
            read: number of bytes of the log read so far; events are not passed twice.
            events: events from :func:`services.training.progress.read_event` gives them.
        """
        with self._write() as session:
            row = _row(session, job)
            attempt = session.scalars(
                select(AttemptRow).where(AttemptRow.job == job, AttemptRow.number == number)
            ).one()
            attempt.read = read
            for reported in events:
                self._take(session, row, attempt, reported)

    def _take(self, session: Session, row: JobRow, attempt: AttemptRow, reported: dict[str, Any]) -> None:
        match reported:
            case {"event": "stage", "text": str(text), **rest}:
                attempt.stage = text
                attempt.trains = attempt.trains or rest.get("trains") is True
                _note(session, row, time_of(reported, self._now()), "stage", text, None)
            case {"event": "run", "run_id": str(run_id), "experiment_id": str(experiment_id)}:
                row.run_id, row.experiment_id, row.untracked = run_id, experiment_id, True
            case {"event": "progress", "images": int(images), "total": int(total), "metrics": dict(metrics)}:
                at = time_of(reported, self._now())
                if attempt.first_at is None:
                    attempt.first_images, attempt.first_at = images, at
                attempt.images, attempt.trains = images, True
                latest = (row.progress or {}).get("metrics", {}) | metrics
                row.progress = progress_of(attempt, images, total, at, latest)
            case {"event": "error", "message": str(message), **rest}:
                told = f"{message}\n  hint: {rest['hint']}" if rest.get("hint") else message
                if rest.get("final", True):
                    attempt.error = told
                else:
                    attempt.message = message
                _note(session, row, time_of(reported, self._now()), "error", told, None)
            case {"event": "done", **rest}:
                row.model = str(rest["model"]) if rest.get("model") else None

    def _move(self, session: Session, row: JobRow, state: State, reason: str) -> None:
        now = self._now()
        changed = row.state != state
        # While an attempt starts, its stages are the events of the job.
        told = changed or (row.reason != reason and state in (State.QUEUED, State.RECOVERING))
        if row.run_id is not None and (changed or row.reason != reason):
            row.untracked = True
        row.reason = reason
        if changed:
            row.state, row.since = state.value, now
            row.ended = now if state.final else None
        if told:
            _note(session, row, now, "state", f"{state.value}: {reason}", state)

    def untracked(self) -> list[Untracked]:
        """Return the jobs whose state is not yet marked in their MLflow run."""
        columns = JobRow.id, JobRow.run_id, JobRow.state, JobRow.reason
        query = select(*columns).where(JobRow.untracked, JobRow.run_id.is_not(None)).limit(100)
        with self._read() as session:
            return [Untracked(r.id, str(r.run_id), State(r.state), r.reason) for r in session.execute(query)]

    def tracked(self, told: Untracked) -> None:
        """Record that the state was marked in MLflow; if the job has changed since, it must be marked again."""
        with self._write() as session:
            row = _row(session, told.job)
            row.untracked = (State(row.state), row.reason) != (told.state, told.reason)

    # Settings

    @property
    def draining(self) -> bool:
        """Return whether the service is draining."""
        with self._read() as session:
            row = session.get(SettingRow, _DRAINING)
            return row is not None and row.value == "yes"

    def drain(self, wanted: bool) -> None:
        """Start or end draining."""
        with self._write() as session:
            session.merge(SettingRow(name=_DRAINING, value="yes" if wanted else "no"))

    # Tokens

    def create_token(self, wanted: TokenRequest, secret: str | None = None) -> NewToken:
        """Create a token; only the digest of its secret is stored.

        Raises:
            ConflictError: a token with this name exists.
        """
        secret = secret or f"monge_{secrets.token_urlsafe(32)}"
        row = TokenRow(
            name=wanted.name,
            role=wanted.role.value,
            digest=_digest(secret),
            requests_per_second=wanted.requests_per_second,
            max_jobs=wanted.max_jobs,
            created=self._now(),
        )
        try:
            with self._write() as session:
                session.add(row)
                session.flush()
                return NewToken(**dict(token_of(row)), secret=secret)
        except IntegrityError:
            raise ConflictError(f"a token {wanted.name!r} exists", hint="choose another name") from None

    def tokens(self) -> list[Token]:
        """Return all tokens, oldest first."""
        with self._read() as session:
            return [token_of(row) for row in session.scalars(select(TokenRow).order_by(TokenRow.key))]

    def revoke(self, name: str) -> Token:
        """Revoke a token.

        Raises:
            JobNotFoundError: no token has this name.
        """
        with self._write() as session:
            row = session.scalars(select(TokenRow).where(TokenRow.name == name)).one_or_none()
            if row is None:
                raise JobNotFoundError(f"no token {name!r}", hint="see `monge token list`")
            row.revoked = row.revoked or self._now()
            revoked = token_of(row)
        self._tokens.forget()
        return revoked

    def authenticate(self, secret: str) -> Token | None:
        """Return the token of a secret; None if there is none or it was revoked."""
        digest, generation = _digest(secret), self._tokens.generation
        with self._read() as session:
            query = select(TokenRow).where(TokenRow.digest == digest, TokenRow.revoked.is_(None))
            row = session.scalars(query).one_or_none()
            token = None if row is None else token_of(row)
        if token is not None:
            self._tokens.remember(digest, token, generation)
        return token

    def authenticated(self, secret: str) -> Token | None:
        """Return the cached token of a secret; None if :meth:`authenticate` must be called."""
        return self._tokens.find(_digest(secret))


class _KnownTokens:
    """Cache of tokens by the digests of their secrets."""

    def __init__(self) -> None:
        self._tokens: dict[str, tuple[Token, float]] = {}
        self._guard = threading.Lock()
        self.generation = 0

    def find(self, digest: str) -> Token | None:
        token, until = self._tokens.get(digest, (None, 0.0))
        return token if time.monotonic() < until else None

    def remember(self, digest: str, token: Token, generation: int) -> None:
        with self._guard:
            if generation == self.generation:  # else a token was revoked since it was read
                self._tokens[digest] = token, time.monotonic() + FRESH

    def forget(self) -> None:
        with self._guard:
            self.generation += 1
            self._tokens.clear()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _row(session: Session, job: str) -> JobRow:
    row = session.scalars(select(JobRow).where(JobRow.id == job)).one_or_none()
    if row is None:
        latest = session.scalars(select(JobRow.id).order_by(JobRow.number.desc()).limit(5)).all()
        raise JobNotFoundError(
            f"no job {job!r}; the latest are: {', '.join(latest) or 'none'}", hint="see `monge jobs`"
        )
    return row


def _by_key(session: Session, owner: str, key: str | None) -> JobRow | None:
    if key is None:
        return None
    return session.scalars(select(JobRow).where(JobRow.owner == owner, JobRow.idempotency_key == key)).one_or_none()


def _seen_by_the_policy(session: Session, rows: Sequence[AttemptRow]) -> dict[str, policy.AttemptView]:
    """Return the attempts that have not ended, by job; their progress is relative to earlier attempts."""
    again = [row.job for row in rows if row.number > 1]
    before = AttemptRow.job.in_(again), AttemptRow.ended.is_not(None)
    furthest = select(AttemptRow.job, func.max(AttemptRow.images)).where(*before).group_by(AttemptRow.job)
    reached = dict(session.execute(furthest).tuples().all())
    return {row.job: open_attempt_of(row, reached.get(row.job)) for row in rows}


def _open_row(session: Session, job: str) -> AttemptRow:
    return session.scalars(select(AttemptRow).where(AttemptRow.job == job, AttemptRow.ended.is_(None))).one()


def _note(session: Session, row: JobRow, at: float, kind: str, text: str, state: State | None) -> None:
    session.add(
        EventRow(job=row.id, attempt=row.attempts or 0, at=at, kind=kind, text=text, state=state and state.value)
    )
