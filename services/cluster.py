"""How a process joins a Ray cluster: on loopback unless told otherwise, and with the cluster's token."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.errors import ServiceError
from services.locks import write_once
from services.settings import LOOPBACK, NAMESPACE, Settings

TOKEN = "ray.token"

CONNECT_SECONDS = 5

log = logging.getLogger(__name__)


def ray_environment(settings: Settings, head: str | None = None) -> dict[str, str]:
    """The environment of every process that starts or joins a Ray cluster, as far as the user has not set it.

    Args:
        settings: where its token lies.
        head: address of the cluster's head; of the home's platform by default.

    Ray takes the network interface's address unless it believes that the machine cannot form a cluster, listens
    without authentication unless there is a token, and counts usage unless told not to.
    """
    wanted = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
        # A worker's lines come to the driver once, not also by Ray Train's own logger.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # Seconds between Ray Train's looks at the workers. It takes one report of theirs at each: at its default of 2 s
        # a job of 40 checkpoints ends more than a minute after its training.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
        # Seconds after SIGTERM until a driver is killed: its workers save a checkpoint first.
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        # A process for each job, 1.5 s of a processor: the workers themselves look whether their node leaves.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Seconds until the log says that there is no room for a job's workers: they fitted when they were placed.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
        # Seconds until a worker whose process answers no more is taken for dead.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "300",
        # Milliseconds until a process closes a connection whose other end is silent: about as long as until a node is
        # taken for dead. At its default of 20 s a cut of the network costs all workers a restart.
        "RAY_grpc_keepalive_timeout_ms": "60000",
        # Seconds that a worker which hangs has to leave its process group, before it is killed and all start again.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    }
    if settings.ray_address is None:
        if not str(head or settings.platform.get("ray_address", LOOPBACK)).startswith(LOOPBACK):
            wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"  # no machine joins otherwise
        wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str((settings.home / TOKEN).absolute())}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def make_token(home: Path) -> Path:
    """The file with the local cluster's token, made where there is none; readable by its owner alone."""
    path = home / TOKEN
    with suppress(FileExistsError):
        write_once(path, secrets.token_hex(32), 0o600)
    return path


def read_token(home: Path) -> str:
    """The cluster's token, as Ray itself looks for it, else that of a home folder; empty where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", home / TOKEN))
    return path.read_text().strip() if path.exists() else ""


def start_cluster(settings: Settings, cpus: int | None) -> None:
    """Start a cluster of this machine that ends with this process, for work that needs nothing else of the platform.

    :func:`ray_environment` has to be in place before anything imports Ray.

    Args:
        settings: where its token lies.
        cpus: tasks at a time; the machine's processors by default.
    """
    make_token(settings.home)
    os.environ.update(ray_environment(settings))
    import ray

    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=LOOPBACK,
    )


def join_cluster(settings: Settings, logs: bool = True) -> None:
    """Connect this process to the cluster; inside a job it is the job's own.

    Args:
        settings: where it is.
        logs: whether what tasks and actors print is printed here too.

    Raises:
        ServiceError: no cluster answers.
    """
    os.environ.update(ray_environment(settings))
    # Not at the top: the environment above has to be in place before Ray is imported, and the import is slow.
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or settings.address("ray_address")
    _require_listener(address)
    options: dict[str, Any] = {}
    if address.startswith(LOOPBACK):
        options["_node_ip_address"] = LOOPBACK
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=logs, logging_level=logging.WARNING, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ServiceError(
            f"no Ray cluster answers at {address}: {error}", hint="see `monge status`; `monge up` starts one here"
        ) from error


def _require_listener(address: str) -> None:
    """Look whether anything listens at ``host:port``: Ray itself tries for minutes before it gives up.

    Raises:
        ServiceError: nothing does.
    """
    found = re.fullmatch(r"(?:ray://)?([^/]+):(\d{1,5})", address)
    if found is None:  # "auto", "local": Ray knows at once
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ServiceError(
            f"no Ray cluster answers at {address}: {error}", hint="see `monge status`; `monge up` starts one here"
        ) from None
