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
"""Seconds that a writer waits for another."""

MIGRATIONS = Path(__file__).parent / "migrations"


def open_database(url: str) -> sa.Engine:
    """Connect to a database and bring its tables to this version.

    Transactions that write have the execution option ``writes``.

    Args:
        url: ``sqlite:////folder/jobs.db`` or ``postgresql+psycopg://user@host/database``.

    Raises:
        ServiceError: it cannot be opened.
    """
    try:
        engine = _connected(url)
        with engine.begin() as connection:
            command.upgrade(migrations(connection), "head")
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ServiceError(f"the store of jobs cannot be opened: {reason}", hint="see MONGE_JOBS_STORE") from error
    return engine


def migrations(connection: sa.Connection) -> Config:
    """What Alembic's commands need to change the tables over a connection."""
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
        connection.isolation_level = None  # transactions begin below, and not when the driver sees fit
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A transaction that reads first and then writes could not wait for another writer.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
