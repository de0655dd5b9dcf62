"""The database of the job service: SQLite or PostgreSQL, with its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import event

from pipelines.errors import ServiceError

SQLITE_WAITS = 30.0
"""Seconds that a writer waits for another writer."""

MIGRATIONS = Path(__file__).parent / "migrations"


def open_database(url: str) -> sa.Engine:
    """Connect to a database and migrate its tables to the current version.

    Transactions that write must have the execution option ``writes``.

    Args:
        url: SQLAlchemy URL: ``sqlite:////folder/jobs.db`` or ``postgresql+psycopg://user@host/database``.

    Raises:
        ServiceError: the database cannot be opened.
    """
    try:
        engine = _connected(url)
        with engine.begin() as connection:
            command.upgrade(migrations(connection), "head")
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ServiceError(f"cannot open the job store: {reason}", hint="check MONGE_JOBS_STORE") from error
    return engine


def migrations(connection: sa.Connection) -> Config:
    """Return the Alembic configuration for migrations over a connection."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def _connected(url: str) -> sa.Engine:
    if not url.startswith("sqlite"):
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": SQLITE_WAITS, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not implicitly in the driver
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A transaction that reads and then writes could not wait for another writer.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
