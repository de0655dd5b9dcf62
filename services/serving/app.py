"""HTTP API of the model endpoint; the same ASGI app runs under uvicorn and Ray Serve."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Path, Request, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines.errors import BusyError, MongeError, SpecError
from pipelines.evaluation.figures import TILE, encode_png, image_grid
from pipelines.models.network import Generator
from services.error_documents import status_of
from services.gate import Gate, RemoteTokens
from services.http import protect
from services.serving import documents
from services.serving.batching import MicroBatcher
from services.serving.bodies import parse_predict
from services.serving.documents import GenerateRequest, PathRequest
from services.serving.metrics import EndpointMetrics
from services.serving.models import LoadedModel, ModelStore, device_of
from services.settings import Settings

SMALL_BODY = 2**16
"""Size in bytes up to which a body is parsed on the event loop; a thread switch would take longer."""

GENERATE_QUEUE = 8
"""Maximum number of waiting and running generate requests; further ones receive status 429."""

ModelName = Annotated[
    str, Path(description="NAME (the version under the alias `live`) or NAME@ALIAS", examples=["cats"])
]

log = logging.getLogger(__name__)


class Endpoint:
    """Shared state of the routes of one app."""

    def __init__(self, settings: Settings, torch_threads: int) -> None:
        self.settings = settings
        self.metrics = EndpointMetrics()
        self.store = ModelStore(
            settings.address("mlflow_uri"),
            settings.home / "models",
            settings.max_image_pixels,
            self.metrics,
            device_of(settings.serving_device),
        )
        self.batcher = MicroBatcher(threads=torch_threads, on_batch=self.metrics.batch.observe)
        self.metrics.watch_queue(lambda: self.batcher.queued)
        # In a separate thread: sampling is slow and must not block predictions.
        self.generator = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self.generating = 0

    async def follow(self, every: float) -> None:
        """Poll the registry until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.store.poll)
            except Exception:
                log.exception("the registry sent an invalid response")
            await asyncio.sleep(every)

    async def model(self, name: str) -> LoadedModel:
        """Return a model by name; load it if necessary."""
        found = self.store.find(name)
        return found if found is not None else await asyncio.to_thread(self.store.load, name)

    async def predict(self, name: str, request: Request) -> Response:
        """Handle a predict request; see the route."""
        model = await self.model(name)
        if model.bundle.kind != "classifier":
            raise _other_kind(name, model)
        content_type, body, shape = request.headers.get("content-type", ""), await request.body(), model.bundle.image
        if len(body) <= SMALL_BODY:
            images = parse_predict(content_type, body, shape)
        else:
            images = await asyncio.to_thread(parse_predict, content_type, body, shape)
        rows = await self.batcher.predict(model, images)
        return _json(
            {
                "model": model.ref.name,
                "version": model.ref.version,
                "predictions": [_prediction(row, model.bundle.classes) for row in rows],
            }
        )

    async def generate(self, name: str, wanted: GenerateRequest, accept: str) -> Response:
        """Handle a generate request; see the route."""
        model = await self._generative(name, wanted.count)
        label = None if wanted.label is None else _class(model, name, wanted.label, "label")

        def samples() -> Response:
            pixels = model.bundle.generate(wanted.count, wanted.seed, label, wanted.truncation)
            return _pictures(model, pixels, _as_json(wanted, accept))

        return await self._drawn(samples)

    async def path(self, name: str, wanted: PathRequest, accept: str) -> Response:
        """Handle a path request; see the route."""
        model = await self._generative(name, wanted.count * wanted.steps)
        start, end = (_class(model, name, getattr(wanted, field), field) for field in ("start", "end"))

        def images() -> Response:
            pixels = model.bundle.path(start, end, wanted.steps, wanted.count, wanted.seed, wanted.truncation)
            return _pictures(model, pixels, _as_json(wanted, accept), columns=wanted.steps)

        return await self._drawn(images)

    async def _generative(self, name: str, count: int) -> LoadedModel:
        """Return a generative model after checking the number of images."""
        model = await self.model(name)
        if model.bundle.kind != "generator":
            raise _other_kind(name, model)
        if count > self.settings.max_generate:
            raise SpecError(
                f"count: {count} images exceed the limit of {self.settings.max_generate}",
                hint="request fewer, or raise MONGE_MAX_GENERATE",
            )
        if count * model.bundle.image.pixels > self.settings.max_image_pixels:
            most = self.settings.max_image_pixels // model.bundle.image.pixels
            raise SpecError(f"count: {count} images exceed the limit of pixels", hint=f"request at most {most}")
        return model

    async def _drawn(self, draw: Callable[[], Response]) -> Response:
        if self.generating >= GENERATE_QUEUE:
            raise BusyError(f"{self.generating} generate requests are already waiting", hint="retry in a second")
        self.generating += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.generator, draw)
        finally:
            self.generating -= 1

    def close(self) -> None:
        """Stop the threads."""
        self.batcher.close()
        self.generator.shutdown(wait=False, cancel_futures=True)


def create_app(
    settings: Settings,
    *,
    poll_seconds: float = 1.0,
    torch_threads: int = 1,
    loopback: bool = True,
    tokens: RemoteTokens | None = None,
) -> FastAPI:
    """Return the app that serves all registered models.

    Args:
        settings: address of the registry, limits, and the home folder, whose ``models`` holds downloaded bundles.
        poll_seconds: seconds between polls of the registry.
        torch_threads: number of torch threads per forward pass; more than one helps large networks only.
        loopback: whether the server listens on loopback only; requests from other origins are then refused.
        tokens: token check for requests; None if no token is required.

    Raises:
        ServiceError: the address of the registry is not known, or a GPU is requested but not available.
    """
    endpoint = Endpoint(settings, torch_threads)
    metrics = endpoint.metrics

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(endpoint.follow(poll_seconds))
        try:
            yield
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            endpoint.close()

    app = FastAPIOffline(title="Monge models", version="1", lifespan=lifespan, description=documents.DESCRIPTION)
    app.state.endpoint = endpoint

    async def counted(route: str, name: str, answer: Awaitable[Response]) -> Response:
        start, status = time.perf_counter(), 500
        try:
            response = await answer
            status = response.status_code
            return response
        except Exception as error:
            status = _status(error)
            raise
        finally:
            # Unknown names would let the number of metrics grow without bound.
            known = name.partition("@")[0].partition("/")[0]
            metrics.requests.labels(route, known if known in endpoint.store.registered else "", status).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - start)

    @app.post("/v1/models/{name}/predict", summary="Classify images", **documents.PREDICT)
    async def predict(name: ModelName, request: Request) -> Response:
        """Return class probabilities of images, which are cropped, resized and converted as in training."""
        return await counted("predict", name, endpoint.predict(name, request))

    @app.post(
        "/v1/models/{name}/versions/{version}/predict",
        summary="Classify images with a fixed version",
        **documents.PREDICT,
    )
    async def predict_version(name: ModelName, version: int, request: Request) -> Response:
        """Return class probabilities of images from a fixed version, independent of aliases."""
        return await counted("predict", name, endpoint.predict(f"{name}/{version}", request))

    @app.post("/v1/models/{name}/generate", summary="Sample from a generator", **documents.GENERATE)
    async def generate(name: ModelName, wanted: GenerateRequest, request: Request) -> Response:
        """Sample from a generator: a PNG grid, or a tensor for `format` json or Accept: application/json."""
        accept = request.headers.get("accept", "")
        return await counted("generate", name, endpoint.generate(name, wanted, accept))

    @app.post(
        "/v1/models/{name}/versions/{version}/generate", summary="Sample from a fixed version", **documents.GENERATE
    )
    async def generate_version(name: ModelName, version: int, wanted: GenerateRequest, request: Request) -> Response:
        """Return samples of a fixed version, independent of aliases."""
        accept = request.headers.get("accept", "")
        return await counted("generate", name, endpoint.generate(f"{name}/{version}", wanted, accept))

    @app.post("/v1/models/{name}/path", summary="Interpolate between two classes", **documents.GENERATE)
    async def path(name: ModelName, wanted: PathRequest, request: Request) -> Response:
        """Interpolate between two classes with a conditional generator; each row of the image is one path."""
        accept = request.headers.get("accept", "")
        return await counted("path", name, endpoint.path(name, wanted, accept))

    @app.post(
        "/v1/models/{name}/versions/{version}/path", summary="Interpolate with a fixed version", **documents.GENERATE
    )
    async def path_version(name: ModelName, version: int, wanted: PathRequest, request: Request) -> Response:
        """Interpolate between two classes with a fixed version, independent of aliases."""
        accept = request.headers.get("accept", "")
        return await counted("path", name, endpoint.path(f"{name}/{version}", wanted, accept))

    @app.get("/v1/models", summary="List models")
    async def models() -> dict[str, Any]:
        """List all registered models and the versions that are served."""
        return {"models": [_listed(name, endpoint.store) for name in sorted(endpoint.store.registered)]}

    @app.get("/v1/models/{name}", responses=documents.ERRORS, summary="Get a model")
    async def model(name: ModelName) -> dict[str, Any]:
        """Return a model: its versions, classes, and the shape of its images."""
        found = await endpoint.model(name)
        return _listed(found.ref.name, endpoint.store) | _card(found)

    @app.get("/health", summary="Check that the process is alive")
    async def health() -> dict[str, str]:
        """Check that the process is alive."""
        return {"status": "live"}

    @app.get("/ready", summary="Check that models can be served")
    async def ready(response: Response) -> dict[str, Any]:
        """Check that models can be served, and report errors of the registry and of versions.

        The endpoint stays ready while the registry is unreachable: loaded models are still served.
        """
        store = endpoint.store
        response.status_code = 200 if store.polled else 503
        return {
            "ready": store.polled,
            "device": str(store.device),
            "registry": {"up": store.polled and store.registry_error is None, "error": store.registry_error},
            "serving": {f"{model.ref.name}@{alias}": model.ref.version for alias, model in store.served},
            "failing": store.failures,
        }

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if tokens is not None:
        app.add_middleware(Gate, tokens=tokens)
    protect(app, max_bytes=int(settings.max_request_mib * 2**20), loopback=loopback)
    return app


def _other_kind(name: str, model: LoadedModel) -> SpecError:
    """Return the error for a request that needs another kind of model."""
    kind = model.bundle.kind
    hints = {
        "classifier": "use /predict",
        "encoder": "load it with mlflow.pyfunc, or use it in objective.features",
        "generator": "use /generate",
    }
    return SpecError(f"model: {name!r} is {'an' if kind == 'encoder' else 'a'} {kind}", hint=hints[kind])


def _class(model: LoadedModel, name: str, label: str, field: str) -> int:
    """Return the index of a requested class of a generator."""
    network, classes = model.bundle.network, model.bundle.classes
    if not isinstance(network, Generator) or not network.conditions:
        raise SpecError(
            f"{field}: model {name!r} is not conditional",
            hint="train a model with model.conditional: true, or omit the class",
        )
    if label not in classes:
        raise SpecError(f"{field}: no class {label!r}", hint=f"use one of {', '.join(classes)}")
    return classes.index(label)


def _as_json(wanted: GenerateRequest | PathRequest, accept: str) -> bool:
    return (wanted.format or ("json" if "application/json" in accept else "png")) == "json"


def _pictures(model: LoadedModel, samples: np.ndarray, as_json: bool, columns: int | None = None) -> Response:
    headers = {"X-Monge-Model": f"{model.ref.name}/{model.ref.version}"}
    if not as_json:
        return Response(encode_png(image_grid(samples, columns, tile=TILE)), media_type="image/png", headers=headers)
    document = {
        "model": model.ref.name,
        "version": model.ref.version,
        "shape": samples.shape,
        "images": base64.b64encode(samples.tobytes()).decode(),
    }
    return _json(document, headers)


def _prediction(row: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    # Six digits: float32 has no more, and batch sizes change the seventh.
    numbers = row.astype(np.float64).round(6).tolist()
    best = int(row.argmax())
    return {
        "class": classes[best],
        "probability": numbers[best],
        "probabilities": dict(zip(classes, numbers, strict=True)),
    }


def _listed(name: str, store: ModelStore) -> dict[str, Any]:
    known = store.registered.get(name)
    return {
        "name": name,
        "aliases": dict(known.aliases) if known else {},
        "latest": known.latest if known else None,
        "serving": {alias: model.ref.version for alias, model in store.served if model.ref.name == name},
    }


def _card(model: LoadedModel) -> dict[str, Any]:
    bundle = model.bundle
    return {
        "version": model.ref.version,
        "kind": model.bundle.kind,
        "network": bundle.spec.kind,
        "parameters": bundle.network.parameter_count,
        "classes": list(bundle.classes),
        "conditional": isinstance(bundle.network, Generator) and bundle.network.conditions > 0,
        "image": dict(zip(("channels", "height", "width"), bundle.image.dims, strict=True)),
        "run_id": model.ref.run_id,
    }


def _json(document: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    content = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return Response(content, headers=headers, media_type="application/json")


def _status(error: Exception) -> int:
    match error:
        case HTTPException():
            return error.status_code
        case MongeError():
            return status_of(error)
        case ClientDisconnect():
            return 499
    return 500
