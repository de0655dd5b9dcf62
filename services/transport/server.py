"""Server process of the transport service: HTTP in front of an engine or of Ray actors."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from functools import partial

import uvicorn

from pipelines.errors import ServiceError
from services.cluster import join_cluster
from services.gate import RemoteTokens, tokens_for
from services.http import CONNECTIONS, bound
from services.settings import LOOPBACK, Settings, load_settings
from services.transport.app import build_app
from services.transport.backend import Backend, LocalBackend
from services.transport.engine import Engine, cores
from services.transport.limits import MIB


def serve(
    host: str = LOOPBACK,
    port: int = 8100,
    ray_address: str | None = None,
    replicas: int = 1,
    *,
    most: int | None = None,
    resource: float = 1.0,
    timeout: float = 60.0,
) -> None:
    """Serve until SIGTERM or SIGINT; then reject waiting problems and stop the actors started here.

    Args:
        host: address to listen on. Not on loopback, requests need a token, which the job service checks.
        port: port to listen on.
        ray_address: address of the Ray cluster whose actors solve; None to solve in this process.
        replicas: number of actors.
        most: maximum number of actors while many problems wait; ``replicas`` by default.
        resource: amount of the ``transport`` resource per actor.
        timeout: seconds to wait for the actors.

    Raises:
        ServiceError: the port is in use, no cluster responds, no node offers the resource, ``most`` is too small, or
            the host is not loopback and no job service is configured.
    """
    settings = load_settings()
    tokens = tokens_for(host, settings)
    if most is not None and (most < replicas or ray_address is None):
        raise ServiceError(
            f"most: received {most} with {replicas if ray_address else 'no'} replicas",
            hint="set the address of a Ray cluster, and at most as many replicas as `most`",
        )
    with bound(host, port) as listener:
        if ray_address is not None:
            _join(settings, ray_address)
        # After Ray, which sets its own handler. Uvicorn shuts down and then raises the signal again; as SystemExit it
        # reaches the clauses below.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if ray_address is None:
            _run(LocalBackend(Engine(threads=cores())), listener, settings, tokens)
            return
        # Import here: without a cluster, Ray is not needed, and its import takes seconds.
        from services.transport.actor import replica_names, start_replicas, stop_replicas
        from services.transport.gateway import RayBackend
        from services.transport.scaling import Policy, Scaler

        created: list[str] = []
        try:
            start_replicas(replicas, resource=resource, timeout=timeout, created=created)
            backend = RayBackend(replica_names(replicas))
            with contextlib.ExitStack() as beside:
                if most is not None and most > replicas:
                    publish = partial(setattr, backend, "spares")
                    beside.enter_context(Scaler(replica_names(replicas), Policy(most - replicas), resource, publish))
                _run(backend, listener, settings, tokens)
        finally:
            stop_replicas(created)


def _run(backend: Backend, listener: socket.socket, settings: Settings, tokens: RemoteTokens | None) -> None:
    max_request = int(settings.max_request_mib * MIB)
    app = build_app(backend, max_request=max_request, loopback=tokens is None, tokens=tokens)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=5
    )
    uvicorn.Server(config).run(sockets=[listener])


def _join(settings: Settings, ray_address: str) -> None:
    if settings.platform.get("ray_address") != ray_address:
        settings = settings.model_copy(update={"ray_address": ray_address})
    join_cluster(settings)
