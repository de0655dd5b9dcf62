"""What the job service remembers: jobs, attempts, events and tokens, in SQLite or PostgreSQL."""

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
"""Queued jobs that the policy looks at: those behind them wait whatever it decides."""

_SEEN = (
    *("id", "number", "workers", "state", "submitted", "reason", "priority", "cancelled_by", "timeout"),
    *("first_started", "attempts", "setbacks", "not_before"),
)

_DRAINING = "draining"

# Lists of what is looked for, not of what is left out: an index finds these.
_UNFINISHED = [state.value for state in State if not state.final]
_ON_THE_CLUSTER = [state for state in _UNFINISHED if state != State.QUEUED]


@dataclass(frozen=True)
class Untracked:
    """A job whose MLflow run does not say yet where the job stands."""

    job: str
    run_id: str
    state: State
    reason: str


class JobStore:
    """The tables, behind one method for each question and each change.

    Args:
        url: ``sqlite:////folder/jobs.db`` or ``postgresql+psycopg://user@host/database``.
        now: the clock, in seconds since 1970.

    Raises:
        ServiceError: the database cannot be opened.
    """

    def __init__(self, url: str, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._engine = open_database(url)
        self._writing = self._engine.execution_options(writes=True)
        # Writers of SQLite that find another at work sleep and try again, up to 0.1 s each time: a lock wakes them.
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
        """Remember a job, queued.

        Args:
            spec: what it does.
            submission: how it was asked for.
            owner: whose it is.
            key: the owner's second request with the same key gives the first one's job.
            origin: the checkpoint of another job that it starts with.

        Returns:
            The job, and whether it is new.

        Raises:
            ConflictError: the key was used for another request.
            BusyError: the owner has as many jobs that are not over as it may have.
        """
        without = {"origin"} if submission.origin is None else set()  # as earlier versions digested a request
        # Aliases may have moved since the same request came first.
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
        except IntegrityError:  # another request with this key was quicker
            with self._read() as session:
                earlier = _by_key(session, owner.name, key)
            if earlier is None:
                raise
        if earlier.request_digest != digest:
            raise ConflictError(
                f"Idempotency-Key: {key!r} was used for another request, that of {earlier.id}", hint="take a new key"
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
            reason="not looked at yet",
            since=now,
        )

    def _require_room(self, session: Session, owner: Token) -> None:
        unfinished = session.scalar(
            select(sa.func.count()).where(JobRow.owner == owner.name, JobRow.state.in_(_UNFINISHED))
        )
        if (unfinished or 0) >= owner.max_jobs:
            raise BusyError(
                f"{owner.name} has {unfinished} jobs that are not over, and may have {owner.max_jobs}",
                hint="wait for one to end, or cancel one",
                retry_after=60.0,
            )

    def job(self, job: str) -> JobDetails:
        """One job, with its attempts and its spec.

        Raises:
            JobNotFoundError: there is none of that id.
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
        """Jobs, newest first.

        Args:
            states: only these.
            owner, name: only of these.
            labels: only those that have all of them.
            before: only those submitted before the job of this number.
            limit: so many at most.
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
        """Where a job stands.

        Raises:
            JobNotFoundError: there is none of that id.
        """
        with self._read() as session:
            return State(_row(session, job).state)

    def counts(self) -> dict[State, int]:
        """How many jobs there are of each state."""
        with self._read() as session:
            rows = session.execute(select(JobRow.state, sa.func.count()).group_by(JobRow.state))
            return {State(state): count for state, count in rows}

    def events(self, job: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """The history of a job after an event, oldest first.

        Raises:
            JobNotFoundError: there is no such job.
        """
        with self._read() as session:
            _row(session, job)
            query = select(EventRow).where(EventRow.job == job, EventRow.id > after).order_by(EventRow.id).limit(limit)
            return [event_of(row) for row in session.scalars(query)]

    def cancel(self, job: str, who: str) -> Job:
        """Ask for the end of a job; one that is over stays as it is.

        Raises:
            JobNotFoundError: there is no such job.
        """
        with self._write() as session:
            row = _row(session, job)
            if not State(row.state).final and row.cancelled_by is None:
                row.cancelled_by = who
                _note(session, row, self._now(), "state", f"{who} asked to cancel it", None)
            return job_of(row)

    def retry(self, job: str, who: str) -> Job:
        """Queue a job again that failed or was cancelled; it goes on from its last checkpoint.

        Raises:
            JobNotFoundError: there is no such job.
            ConflictError: it is not over, or has succeeded.
        """
        with self._write() as session:
            row = _row(session, job)
            if row.state not in (State.FAILED, State.CANCELLED):
                raise ConflictError(f"job {job} is {row.state}", hint="only a failed or cancelled job can be retried")
            row.cancelled_by = row.ended = row.first_started = None
            row.setbacks, row.not_before = 0, 0.0
            self._move(session, row, State.QUEUED, f"queued again by {who}")
            return job_of(row)

    # What the controller needs

    def unfinished(self, queue: int = QUEUE_SEEN) -> list[policy.JobView]:
        """Jobs that are not over, as the policy sees them; the status of their attempts is not known yet.

        Args:
            queue: so many of those at most that are queued, the first ones.
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
        """The attempt at a job that has not ended, as the policy sees it."""
        with self._read() as session:
            return _seen_by_the_policy(session, [_open_row(session, job)])[job]

    def move(self, moves: Sequence[policy.Move]) -> None:
        """Give jobs other states or reasons."""
        with self._write() as session:
            for move in moves:
                self._move(session, _row(session, move.job), move.state, move.reason)

    def start(self, job: str, placement: Placement, reason: str) -> int:
        """Begin the next attempt at a job; returns its number."""
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
        """The cluster has accepted the attempt."""
        with self._write() as session:
            attempt = _open_row(session, job)
            attempt.sent, attempt.started = True, self._now()

    def stopping(self, job: str) -> None:
        """The end of the attempt was asked for."""
        with self._write() as session:
            _open_row(session, job).stopping = True

    def end_attempt(self, action: policy.EndAttempt, message: str) -> None:
        """Close the attempt at a job, and move the job."""
        with self._write() as session:
            row, attempt = _row(session, action.job), _open_row(session, action.job)
            attempt.ended, attempt.outcome, attempt.message = self._now(), action.outcome, message
            row.setbacks, row.not_before = action.setbacks, action.not_before
            self._move(session, row, action.state, action.reason)

    def spec(self, job: str) -> tuple[str, str | None, dict[str, str]]:
        """The spec of a job as JSON, its origin, and what else the cluster is told of it."""
        with self._read() as session:
            row = _row(session, job)
            metadata = {"job": row.id, "name": row.name, "kind": row.kind, "owner": row.owner}
            return json.dumps(row.spec), row.origin, metadata

    def read_of(self, job: str, number: int) -> int:
        """Bytes of an attempt's log whose reports were taken in."""
        query = select(AttemptRow.read).where(AttemptRow.job == job, AttemptRow.number == number)
        with self._read() as session:
            return int(session.scalars(query).one())

    def report(self, job: str, number: int, read: int, events: Sequence[dict[str, Any]]) -> None:
        """Take in what an attempt reported in its log.

        Args:
            job: its id.
            number: of the attempt.
            read: bytes of the log that were read so far; events of a part that was read before are not given again.
            events: as :func:`services.training.progress.read_event` gives them.
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
        # While an attempt starts, its stages tell the story; queues have no other teller.
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
        """Jobs whose MLflow run does not say yet where they stand."""
        columns = JobRow.id, JobRow.run_id, JobRow.state, JobRow.reason
        query = select(*columns).where(JobRow.untracked, JobRow.run_id.is_not(None)).limit(100)
        with self._read() as session:
            return [Untracked(r.id, str(r.run_id), State(r.state), r.reason) for r in session.execute(query)]

    def tracked(self, told: Untracked) -> None:
        """MLflow was told; of a job that has moved meanwhile it has to be told again."""
        with self._write() as session:
            row = _row(session, told.job)
            row.untracked = (State(row.state), row.reason) != (told.state, told.reason)

    # Settings

    @property
    def draining(self) -> bool:
        """Whether nothing is to start, and what runs is to stop until later."""
        with self._read() as session:
            row = session.get(SettingRow, _DRAINING)
            return row is not None and row.value == "yes"

    def drain(self, wanted: bool) -> None:
        """Begin or end draining."""
        with self._write() as session:
            session.merge(SettingRow(name=_DRAINING, value="yes" if wanted else "no"))

    # Tokens

    def create_token(self, wanted: TokenRequest, secret: str | None = None) -> NewToken:
        """Make a token; its secret is kept as a digest alone.

        Raises:
            ConflictError: there is one of that name.
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
            raise ConflictError(f"there is a token {wanted.name!r}", hint="choose another name") from None

    def tokens(self) -> list[Token]:
        """All tokens, oldest first."""
        with self._read() as session:
            return [token_of(row) for row in session.scalars(select(TokenRow).order_by(TokenRow.key))]

    def revoke(self, name: str) -> Token:
        """Revoke a token.

        Raises:
            JobNotFoundError: there is none of that name.
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
        """The token of a secret, None where it has none or a revoked one."""
        digest, generation = _digest(secret), self._tokens.generation
        with self._read() as session:
            query = select(TokenRow).where(TokenRow.digest == digest, TokenRow.revoked.is_(None))
            row = session.scalars(query).one_or_none()
            token = None if row is None else token_of(row)
        if token is not None:
            self._tokens.remember(digest, token, generation)
        return token

    def authenticated(self, secret: str) -> Token | None:
        """The token of a secret, from memory; None where :meth:`authenticate` has to look."""
        return self._tokens.find(_digest(secret))


class _KnownTokens:
    """Tokens by the digests of their secrets: each request has one, and revoking is rare."""

    def __init__(self) -> None:
        self._tokens: dict[str, tuple[Token, float]] = {}
        self._guard = threading.Lock()
        self.generation = 0

    def find(self, digest: str) -> Token | None:
        token, until = self._tokens.get(digest, (None, 0.0))
        return token if time.monotonic() < until else None

    def remember(self, digest: str, token: Token, generation: int) -> None:
        with self._guard:
            if generation == self.generation:  # else it was read before another was revoked, or itself
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
    """Attempts that have not ended, by their jobs; whether they progressed depends on the attempts before."""
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
