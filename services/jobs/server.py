"""The server process of the job service: store, controller and API."""

from __future__ import annotations

import gc
import logging
import secrets
import sys

import uvicorn

from pipelines.errors import ConflictError, ServiceError
from services.cluster import read_token
from services.http import CONNECTIONS, bound, is_loopback
from services.jobs.admission import Admission
from services.jobs.api import ApiContext, build_app
from services.jobs.attempt_logs import AttemptLogs
from services.jobs.controller import Controller, Controlling, Launch
from services.jobs.documents import TokenRequest
from services.jobs.joining import offer
from services.jobs.nodes import Nodes
from services.jobs.policy import SchedulingLimits
from services.jobs.ray_jobs import RayJobs
from services.jobs.store import JobStore, Untracked
from services.locks import alone, write_once
from services.settings import LOOPBACK, Settings, load_settings
from services.tokens import Role

log = logging.getLogger(__name__)

KEEP_ALIVE = 30
"""Seconds for which idle connections are kept; longer than clients keep them, so that no request meets a closed one."""

OWNER = "owner"
"""Name of the token that the service creates for users who can read its home folder."""


def serve(host: str = LOOPBACK, port: int = 8200, settings: Settings | None = None) -> None:
    """Serve until SIGTERM or SIGINT; jobs on the cluster continue to run.

    Args:
        host: address to listen on.
        port: port to listen on.
        settings: settings; read from the environment by default.

    Raises:
        ServiceError: the port is in use, another service uses this store, or the cluster's address is not known.
    """
    settings = settings or load_settings()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stdout)
    logging.getLogger("monge.audit").setLevel(logging.INFO)
    folder = settings.home.absolute() / "jobservice"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with alone(folder / "lock", f"another job service uses {folder}"), bound(host, port) as listener:
        store = JobStore(settings.jobs_store or f"sqlite:///{folder / 'jobs.db'}")
        make_owner(store, settings)
        uri = settings.address("mlflow_uri")
        logs = AttemptLogs(folder / "logs")
        launch = Launch() if settings.job_python is None else Launch(settings.job_python, settings.home.absolute())
        engine = RayJobs(settings.address("ray_dashboard"), read_token(settings.home))
        limits = SchedulingLimits(running=settings.jobs_running)
        controller = Controller(store, engine, logs, launch, limits, lambda told: _track(uri, told))
        controlling = Controlling(controller)

        def close() -> None:
            controlling.close()
            store.close()

        service = ApiContext(
            store,
            logs,
            Admission(settings, lambda model: _version(uri, model)),
            seen=lambda: (controller.seen, controller.looked),
            poke=controlling.poke,
            mlflow=lambda: settings.mlflow_public_uri or uri,
            joining=lambda: offer(settings, loopback=is_loopback(host)),
            nodes=Nodes(settings),
        )
        app = build_app(service, loopback=is_loopback(host), close=close)
        # Exclude objects loaded so far from garbage collection: each scan of them would take a quarter of a second.
        gc.collect()
        gc.freeze()
        controlling.start()
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=KEEP_ALIVE,
        )
        uvicorn.Server(config).run(sockets=[listener])


def make_owner(store: JobStore, settings: Settings) -> None:
    """Create the administrator token ``token`` in the home folder at the first start.

    ``MONGE_TOKEN`` in the service's environment takes precedence, for platforms that manage secrets themselves.
    """
    path = settings.home / "token"
    secret = None if settings.token is None else settings.token.get_secret_value()
    if secret is None and path.exists():
        secret = path.read_text().strip()
    if secret is None:
        secret = f"monge_{secrets.token_urlsafe(32)}"
        write_once(path, secret + "\n", 0o600)
    if store.authenticate(secret) is None:
        known = {token.name for token in store.tokens()}
        name = OWNER if OWNER not in known else f"{OWNER}-{secrets.token_hex(2)}"
        try:
            store.create_token(TokenRequest(name=name, role=Role.ADMIN), secret)
        except ConflictError:
            raise ServiceError(f"the token in {path} was revoked", hint=f"remove {path} to create a new one") from None


def _version(uri: str, model: str) -> str:
    from services.tracking.registry import resolve

    return resolve(uri, model).by_version


def _track(uri: str, told: Untracked) -> None:
    from services.tracking.connection import can_retry_call
    from services.tracking.run import mark

    try:
        mark(uri, told.run_id, told.state.value, told.reason)
    except ServiceError as error:
        if can_retry_call(error):
            raise
        # For example, the run was deleted. Other jobs must not wait for this one.
        log.warning("cannot mark the state of %s in MLflow: %s", told.job, error.args[0])
