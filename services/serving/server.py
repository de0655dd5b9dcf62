"""The endpoint as a process of its own, under uvicorn."""

from __future__ import annotations

import uvicorn

from services.gate import tokens_for
from services.serving.app import create_app
from services.settings import LOOPBACK, Settings, load_settings


def serve(host: str = LOOPBACK, port: int = 8000, settings: Settings | None = None) -> None:
    """Serve every registered model until the process is told to end; requests under way are answered first.

    Args:
        host: address to listen on. Beyond loopback each request needs a token, which the job service checks.
        port: to listen on.
        settings: from the environment by default.

    Raises:
        ServiceError: the registry's address is not known, or others reach the host and no job service is known.
    """
    settings = settings or load_settings()
    tokens = tokens_for(host, settings)
    app = create_app(settings, loopback=tokens is None, tokens=tokens)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
