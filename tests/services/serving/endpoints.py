"""Endpoints in this process, and images to send to them."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from services.serving.app import Endpoint, create_app
from services.settings import Settings
from services.tracking.registry import ModelRef, register
from tests.services.tracking.stores import make_bundle, open_run

PNG = {"content-type": "image/png"}


def publish(
    uri: str, folder: Path, name: str = "cats", kind: str = "classification", seed: int = 0, alias: str = "live"
) -> ModelRef:
    """Register a bundle with random weights."""
    run = open_run(uri)
    ref = register(run, make_bundle(kind, seed).save(folder / f"{name}-{seed}"), name, alias)
    run.close()
    return ref


def encoded(seed: int = 0, side: int = 16, form: str = "PNG") -> bytes:
    """A grey image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@asynccontextmanager
async def endpoint(
    uri: str, home: Path, poll_seconds: float = 1000.0, **limits: float
) -> AsyncIterator[tuple[httpx.AsyncClient, Endpoint]]:
    """Yield a client of an endpoint that has polled once; by default, it polls again only on request."""
    app = create_app(Settings(home=home, mlflow_uri=uri, **limits), poll_seconds=poll_seconds)  # type: ignore[arg-type]
    shared: Endpoint = app.state.endpoint
    shared.store.poll()
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
    ):
        yield client, shared
