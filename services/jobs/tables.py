"""Tables of the job service in SQLite or PostgreSQL, created by ``migrations/``."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Base class of the tables. Times are seconds since 1970: SQLite has no time zones."""


class JobRow(Base):
    """A job: its submission and its state."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("owner", "idempotency_key"),
        Index("jobs_by_state", "state", "turn"),
        Index("jobs_by_owner", "owner", "state"),
        Index("jobs_untracked", "untracked"),
    )

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(String(200), unique=True)
    name: Mapped[str] = mapped_column(String(128))
    kind: Mapped[str] = mapped_column(String(64))
    # Large and seldom needed: loaded on access.
    spec: Mapped[dict[str, Any]] = mapped_column(JSON, deferred=True)
    workers: Mapped[dict[str, Any]] = mapped_column(JSON)
    owner: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(128))
    request_digest: Mapped[str] = mapped_column(String(64))
    priority: Mapped[int]
    turn: Mapped[float]
    timeout: Mapped[float | None]
    labels: Mapped[dict[str, str]] = mapped_column(JSON)
    submitted: Mapped[float]
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text)
    since: Mapped[float]
    cancelled_by: Mapped[str | None] = mapped_column(String(64))
    first_started: Mapped[float | None]
    ended: Mapped[float | None]
    attempts: Mapped[int] = mapped_column(default=0)
    setbacks: Mapped[int] = mapped_column(default=0)
    not_before: Mapped[float] = mapped_column(default=0.0)
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    run_id: Mapped[str | None] = mapped_column(String(64))
    experiment_id: Mapped[str | None] = mapped_column(String(64))
    model: Mapped[str | None] = mapped_column(String(256))
    # Whether the state of the job must still be marked in MLflow.
    untracked: Mapped[bool] = mapped_column(default=False)
    # JOB@IMAGES, or JOB if the service cannot see the checkpoints.
    origin: Mapped[str | None] = mapped_column(String(224))


class AttemptRow(Base):
    """An attempt of a job: one driver on the cluster."""

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("job", "number"),)

    key: Mapped[int] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    workers: Mapped[int]
    gpu: Mapped[bool]
    started: Mapped[float]
    sent: Mapped[bool] = mapped_column(default=False)
    ended: Mapped[float | None]
    outcome: Mapped[str | None] = mapped_column(String(16))
    message: Mapped[str | None] = mapped_column(Text)
    stage: Mapped[str | None] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    stopping: Mapped[bool] = mapped_column(default=False)
    trains: Mapped[bool] = mapped_column(default=False)
    first_images: Mapped[int | None]
    first_at: Mapped[float | None]
    images: Mapped[int | None]
    read: Mapped[int] = mapped_column(default=0)


class EventRow(Base):
    """An event in the history of a job."""

    __tablename__ = "events"
    __table_args__ = (Index("events_of_job", "job", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    at: Mapped[float]
    kind: Mapped[str] = mapped_column(String(16))
    text: Mapped[str] = mapped_column(Text)
    state: Mapped[str | None] = mapped_column(String(16))


class TokenRow(Base):
    """A token; only its digest is stored."""

    __tablename__ = "tokens"

    key: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    requests_per_second: Mapped[float]
    max_jobs: Mapped[int]
    created: Mapped[float]
    revoked: Mapped[float | None]


class SettingRow(Base):
    """A setting changed by an administrator, such as ``draining``."""

    __tablename__ = "settings"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)
