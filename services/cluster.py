"""Start and join Ray clusters: on loopback by default, and with the cluster's token."""

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
    """Return the environment of processes that start or join a Ray cluster, without variables that are already set.

    Args:
        settings: settings with the home folder, which holds the token.
        head: address of the head; by default that of the platform in the home folder.

    By default, Ray listens on the address of the network interface if the machine can form a cluster, requires no
    token, and reports usage statistics.
    """
    wanted = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
        # Print a worker's lines once, not also through Ray Train's own logger.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # Seconds between polls of the workers by Ray Train. It handles one report at each poll: at its default of 2 s,
        # a job with 40 checkpoints ends more than a minute after its training.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
        # Seconds between SIGTERM and SIGKILL for a driver: its workers save a checkpoint in this time.
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        # Disabled: it starts a process per job and takes 1.5 s of CPU; the workers check for draining nodes themselves.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Seconds until Ray Train warns about missing resources; they were available when the job was placed.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
        # Seconds until a worker whose process does not respond is considered dead.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "300",
        # Milliseconds until a process closes a connection to a silent peer: about as long as until a node is considered
        # dead. At its default of 20 s, a short network failure restarts all workers.
        "RAY_grpc_keepalive_timeout_ms": "60000",
        # Seconds that a hanging worker has to leave its process group before it is killed and all workers restart.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    }
    if settings.ray_address is None:
        if not str(head or settings.platform.get("ray_address", LOOPBACK)).startswith(LOOPBACK):
            wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"  # otherwise no machine can join
        wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str((settings.home / TOKEN).absolute())}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def make_token(home: Path) -> Path:
    """Return the file with the token of the local cluster; create it, readable only by its owner, if needed."""
    path = home / TOKEN
    with suppress(FileExistsError):
        write_once(path, secrets.token_hex(32), 0o600)
    return path


def read_token(home: Path) -> str:
    """Return the token of the cluster: the one that Ray finds, else that of the home folder; empty if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", home / TOKEN))
    return path.read_text().strip() if path.exists() else ""


def start_cluster(settings: Settings, cpus: int | None) -> None:
    """Start a local cluster that ends with this process, for work that needs no other service.

    :func:`ray_environment` must be applied before Ray is imported.

    Args:
        settings: settings with the home folder, which holds the token.
        cpus: number of concurrent tasks; by default the number of CPUs.
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
    """Connect this process to the cluster; inside a job, to the cluster of the job.

    Args:
        settings: settings with the address of the cluster.
        logs: whether to print the output of tasks and actors.

    Raises:
        ServiceError: the cluster is unreachable.
    """
    os.environ.update(ray_environment(settings))
    # Import here: the environment above must be set before the import, which is slow.
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
            f"the Ray cluster at {address} is unreachable: {error}", hint="check `monge status`, or run `monge up`"
        ) from error


def _require_listener(address: str) -> None:
    """Raise if nothing listens at ``host:port``; Ray itself would retry for minutes.

    Raises:
        ServiceError: nothing listens there.
    """
    found = re.fullmatch(r"(?:ray://)?([^/]+):(\d{1,5})", address)
    if found is None:  # "auto", "local": Ray resolves these without delay
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ServiceError(
            f"the Ray cluster at {address} is unreachable: {error}", hint="check `monge status`, or run `monge up`"
        ) from None
