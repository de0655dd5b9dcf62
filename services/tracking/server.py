"""How the platform starts its MLflow server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from services.tracking.connection import quiet_environment


def server_command(host: str, port: int, backend_uri: str, artifacts_dir: str | Path) -> list[str]:
    """The command line of an MLflow server that stores artifacts itself, so that its clients need no access to them.

    One worker: MLflow's default of four takes half as long again to start and three times the memory, and SQLite takes
    one writer at a time anyway. Start it in the environment of :func:`server_environment`.

    Args:
        host: address to listen on. Whatever it is, the server answers under localhost and private addresses alone; for
            other names it wants ``--allowed-hosts``.
        port: to listen on.
        backend_uri: of the store of runs and models, as in ``sqlite:////data/monge/mlflow.db``.
        artifacts_dir: a folder, or an ``s3://`` address whose keys only this server has.
    """
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", backend_uri, "--artifacts-destination", str(artifacts_dir)),
    ]


def server_environment() -> dict[str, str]:
    """The environment of the server process: this one's, without telemetry and without MLflow's own job runner.

    The job runner, for evaluating language models, takes eight processes and half of the server's memory.
    """
    return {**os.environ, **quiet_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
