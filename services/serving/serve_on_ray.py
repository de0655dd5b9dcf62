"""The endpoint as a Ray Serve application: the same app on several replicas.

Run ``serve run services.serving.serve_on_ray:endpoint``, or call ``serve.run(bind_app(settings, replicas=2))``.
"""

from __future__ import annotations

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from services.serving.app import create_app
from services.settings import Settings, load_settings


def bind_app(settings: Settings, *, replicas: int = 1, cpus: float = 1.0) -> Application:
    """Return an application for ``serve.run``.

    Each replica follows the registry and batches its own requests.

    Args:
        settings: see :func:`~services.serving.app.create_app`.
        replicas: number of processes.
        cpus: number of CPUs that each process reserves.
    """

    def build() -> FastAPI:
        # Evaluated in the replica: threads and metrics cannot be serialised.
        # Serve's proxy listens for requests; its host names are not known here.
        return create_app(settings, loopback=False)

    deployment = serve.deployment(
        name="monge-endpoint",
        num_replicas=replicas,
        max_ongoing_requests=128,
        ray_actor_options={"num_cpus": cpus},
    )(serve.ingress(build)())
    return deployment.bind()


def endpoint(arguments: dict[str, str]) -> Application:
    """Entry point for ``serve run``: settings from the environment, ``replicas=N`` from the command line."""
    return bind_app(load_settings(), replicas=int(arguments.get("replicas", "1")))
