"""The endpoint as a process of its own, under uvicorn."""

from __future__ import annotations

import uvicorn

from services.http import is_loopback
from services.serving.app import create_app
from services.settings import LOOPBACK, Settings, load_settings


def serve(host: str = LOOPBACK, port: int = 8000, settings: Settings | None = None) -> None:
    """Serve every registered model until the process is told to end; requests under way are answered first.

    Args:
        host: address to listen on. There is no authentication: others than the loopback belong behind a proxy.
        port: to listen on.
        settings: from the environment by default.

    Raises:
        ServiceError: the registry's address is not known.
    """
    app = create_app(settings or load_settings(), loopback=is_loopback(host))
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
