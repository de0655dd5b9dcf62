"""Parameters for joining the cluster, and the id that identifies the shared home folder."""

from __future__ import annotations

import platform
import secrets
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from pipelines.errors import ConflictError
from services.cluster import read_token
from services.jobs.documents import Joining
from services.locks import write_once
from services.settings import Settings

HOME_ID = "home.id"


def make_home_id(home: Path) -> str:
    """Return the id of a home folder, and create it if needed. Another folder at the same path has another id."""
    with suppress(FileExistsError):
        write_once(home / HOME_ID, secrets.token_hex(8) + "\n", 0o644)
    return read_home_id(home)


def read_home_id(home: Path) -> str:
    """Return the id of a home folder; empty if it cannot be read."""
    try:
        return (home / HOME_ID).read_text().strip()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Return the versions that all nodes must share. Ray also compares its own and Python's version."""
    return {"monge": version("monge"), "ray": version("ray"), "Python": platform.python_version()}


def offer(settings: Settings, *, loopback: bool) -> Joining:
    """Return what a node needs to join the cluster now.

    Args:
        settings: settings; files written by ``monge up`` are read again.
        loopback: whether the platform listens on loopback only.

    Raises:
        ConflictError: the platform listens on loopback only.
        ServiceError: the cluster's address is not known.
    """
    if loopback:
        raise ConflictError(
            "the platform listens on 127.0.0.1, which other machines cannot reach",
            hint="run `monge down`, then `monge up --host ADDRESS` on the head",
        )
    home = settings.home.absolute()
    now = Settings(home=home)
    return Joining(
        ray_address=now.address("ray_address"),
        ray_token=read_token(home),
        mlflow_uri=now.address("mlflow_uri"),
        transport_url=now.transport_url or now.platform.get("transport_url"),
        home=str(home),
        home_id=make_home_id(home),
        versions=versions(),
        storage=settings.storage,
    )
