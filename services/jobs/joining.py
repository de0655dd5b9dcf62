"""What another machine needs to know to become a node of the cluster, and how it knows the shared home again."""

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
    """The id of a home folder, made where there is none: a folder of the same path elsewhere has another one."""
    with suppress(FileExistsError):
        write_once(home / HOME_ID, secrets.token_hex(8) + "\n", 0o644)
    return read_home_id(home)


def read_home_id(home: Path) -> str:
    """The id of a home folder; empty where it cannot be read."""
    try:
        return (home / HOME_ID).read_text().strip()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Of what all nodes have to have the same version of. Ray compares its own and Python's too, in other words."""
    return {"monge": version("monge"), "ray": version("ray"), "Python": platform.python_version()}


def offer(settings: Settings, *, loopback: bool) -> Joining:
    """What a node needs to know, as of now.

    Args:
        settings: where all is; what ``monge up`` has written since is read again.
        loopback: whether the platform listens there alone.

    Raises:
        ConflictError: no other machine reaches the platform.
        ServiceError: the cluster's address is not known.
    """
    if loopback:
        raise ConflictError(
            "the platform listens on 127.0.0.1, where no other machine reaches it",
            hint="`monge down`, then `monge up --host ADDRESS` on the head",
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
