"""The endpoint as a separate process, under uvicorn."""

from __future__ import annotations

import uvicorn

from services.gate import tokens_for
from services.serving.app import create_app
from services.settings import LOOPBACK, Settings, load_settings


def serve(host: str = LOOPBACK, port: int = 8000, settings: Settings | None = None) -> None:
    """Serve all registered models until the process is asked to stop; running requests are completed.

    Args:
        host: address to listen on. Not on loopback, requests need a token, which the job service checks.
        port: port to listen on.
        settings: settings; read from the environment by default.

    Raises:
        ServiceError: the registry's address is not known, or the host is not loopback and no job service is configured.
    """
    settings = settings or load_settings()
    tokens = tokens_for(host, settings)
    app = create_app(settings, loopback=tokens is None, tokens=tokens)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
