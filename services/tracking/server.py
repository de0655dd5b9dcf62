"""Command and environment of the platform's MLflow server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from services.tracking.connection import quiet_environment


def server_command(host: str, port: int, backend_uri: str, artifacts_dir: str | Path) -> list[str]:
    """Return the command of an MLflow server that stores artifacts itself, so that clients need no access to them.

    One worker: MLflow's default of four takes half as long again to start and three times the memory, and SQLite allows
    one writer at a time. Start it with the environment from :func:`server_environment`.

    Args:
        host: address to listen on. The server accepts only localhost and private addresses as host names; other names
            require ``--allowed-hosts``.
        port: port to listen on.
        backend_uri: URI of the store of runs and models, such as ``sqlite:////data/monge/mlflow.db``.
        artifacts_dir: folder, or an ``s3://`` address whose keys only this server has.
    """
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", backend_uri, "--artifacts-destination", str(artifacts_dir)),
    ]


def server_environment() -> dict[str, str]:
    """Return the environment of the server: this process's, without telemetry and without MLflow's job runner.

    The job runner evaluates language models; it takes eight processes and half of the server's memory.
    """
    return {**os.environ, **quiet_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
