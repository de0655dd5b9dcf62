"""The model endpoint: one ASGI app, the same under uvicorn and under Ray Serve."""

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
"""Bytes up to which a body is parsed on the event loop: handing it to a thread would take longer."""

GENERATE_QUEUE = 8
"""Generate requests that may wait or run; beyond that 429."""

ModelName = Annotated[
    str, Path(description="NAME (the version under the alias `live`) or NAME@ALIAS", examples=["cats"])
]

log = logging.getLogger(__name__)


class Endpoint:
    """What the routes of one app share."""

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
        # Samples take long; in a thread of their own they do not hold up predictions.
        self.generator = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self.generating = 0

    async def follow(self, every: float) -> None:
        """Poll the registry for ever."""
        while True:
            try:
                await asyncio.to_thread(self.store.poll)
            except Exception:
                log.exception("the registry's answer was not understood")
            await asyncio.sleep(every)

    async def model(self, name: str) -> LoadedModel:
        """A model by name, loaded now if it is not served yet."""
        found = self.store.find(name)
        return found if found is not None else await asyncio.to_thread(self.store.load, name)

    async def predict(self, name: str, request: Request) -> Response:
        """Answer a predict request; see the route."""
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
        """Answer a generate request; see the route."""
        model = await self._generative(name, wanted.count)
        label = None if wanted.label is None else _class(model, name, wanted.label, "label")

        def samples() -> Response:
            pixels = model.bundle.generate(wanted.count, wanted.seed, label, wanted.truncation)
            return _pictures(model, pixels, _as_json(wanted, accept))

        return await self._drawn(samples)

    async def path(self, name: str, wanted: PathRequest, accept: str) -> Response:
        """Answer a path request; see the route."""
        model = await self._generative(name, wanted.count * wanted.steps)
        start, end = (_class(model, name, getattr(wanted, field), field) for field in ("start", "end"))

        def images() -> Response:
            pixels = model.bundle.path(start, end, wanted.steps, wanted.count, wanted.seed, wanted.truncation)
            return _pictures(model, pixels, _as_json(wanted, accept), columns=wanted.steps)

        return await self._drawn(images)

    async def _generative(self, name: str, count: int) -> LoadedModel:
        """A model that can make so many images at once."""
        model = await self.model(name)
        if model.bundle.kind != "generator":
            raise _other_kind(name, model)
        if count > self.settings.max_generate:
            raise SpecError(
                f"count: {count} images are over the limit of {self.settings.max_generate}",
                hint="ask for fewer, or raise MONGE_MAX_GENERATE",
            )
        if count * model.bundle.image.pixels > self.settings.max_image_pixels:
            most = self.settings.max_image_pixels // model.bundle.image.pixels
            raise SpecError(f"count: {count} images make too many pixels", hint=f"ask for {most} at most")
        return model

    async def _drawn(self, draw: Callable[[], Response]) -> Response:
        if self.generating >= GENERATE_QUEUE:
            raise BusyError(f"{self.generating} generate requests wait already", hint="ask again in a second")
        self.generating += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.generator, draw)
        finally:
            self.generating -= 1

    def close(self) -> None:
        """End the threads."""
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
    """The endpoint of every registered model.

    Args:
        settings: address of the registry, limits, and the home in whose folder ``models`` bundles are kept.
        poll_seconds: between two looks at the registry's aliases.
        torch_threads: of one pass through a network; more help large networks only.
        loopback: whether it listens there alone; requests of foreign pages are then refused.
        tokens: checks the token that each request for a model then needs; None asks for none.

    Raises:
        ServiceError: the registry's address is not known, or a GPU is asked for and there is none.
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
            # Names that are not registered would grow the metrics without bound.
            known = name.partition("@")[0].partition("/")[0]
            metrics.requests.labels(route, known if known in endpoint.store.registered else "", status).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - start)

    @app.post("/v1/models/{name}/predict", **documents.PREDICT)
    async def predict(name: ModelName, request: Request) -> Response:
        """Class probabilities of images, which are cropped, resized and converted as in training."""
        return await counted("predict", name, endpoint.predict(name, request))

    @app.post("/v1/models/{name}/versions/{version}/predict", **documents.PREDICT)
    async def predict_version(name: ModelName, version: int, request: Request) -> Response:
        """The same, by a version whatever the aliases say."""
        return await counted("predict", name, endpoint.predict(f"{name}/{version}", request))

    @app.post("/v1/models/{name}/generate", **documents.GENERATE)
    async def generate(name: ModelName, wanted: GenerateRequest, request: Request) -> Response:
        """Samples of a generator: a PNG grid, or a tensor with `format` json or Accept: application/json."""
        accept = request.headers.get("accept", "")
        return await counted("generate", name, endpoint.generate(name, wanted, accept))

    @app.post("/v1/models/{name}/versions/{version}/generate", **documents.GENERATE)
    async def generate_version(name: ModelName, version: int, wanted: GenerateRequest, request: Request) -> Response:
        """The same, by a version whatever the aliases say."""
        accept = request.headers.get("accept", "")
        return await counted("generate", name, endpoint.generate(f"{name}/{version}", wanted, accept))

    @app.post("/v1/models/{name}/path", **documents.GENERATE)
    async def path(name: ModelName, wanted: PathRequest, request: Request) -> Response:
        """Images on the way from one class to another, of a conditional generator: a row for each path."""
        accept = request.headers.get("accept", "")
        return await counted("path", name, endpoint.path(name, wanted, accept))

    @app.post("/v1/models/{name}/versions/{version}/path", **documents.GENERATE)
    async def path_version(name: ModelName, version: int, wanted: PathRequest, request: Request) -> Response:
        """The same, by a version whatever the aliases say."""
        accept = request.headers.get("accept", "")
        return await counted("path", name, endpoint.path(f"{name}/{version}", wanted, accept))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Every registered model, and the versions that are served."""
        return {"models": [_listed(name, endpoint.store) for name in sorted(endpoint.store.registered)]}

    @app.get("/v1/models/{name}", responses=documents.ERRORS)
    async def model(name: ModelName) -> dict[str, Any]:
        """One model: its versions, classes and the images that it takes or makes."""
        found = await endpoint.model(name)
        return _listed(found.ref.name, endpoint.store) | _card(found)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "live"}

    @app.get("/ready")
    async def ready(response: Response) -> dict[str, Any]:
        """Whether models can be served; what is wrong with the registry or with a version, where something is.

        A registry that is away does not make a serving endpoint unready: what is loaded stays served.
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
    """The error of a request that is for models of another kind."""
    kind = model.bundle.kind
    hints = {
        "classifier": "ask its /predict",
        "encoder": "load it with mlflow.pyfunc, or name it in objective.features",
        "generator": "ask its /generate",
    }
    return SpecError(f"model: {name!r} is {'an' if kind == 'encoder' else 'a'} {kind}", hint=hints[kind])


def _class(model: LoadedModel, name: str, label: str, field: str) -> int:
    """The number of a class that is asked of a generator."""
    network, classes = model.bundle.network, model.bundle.classes
    if not isinstance(network, Generator) or not network.conditions:
        raise SpecError(
            f"{field}: model {name!r} knows no classes", hint="train one with model.conditional: true, or leave it out"
        )
    if label not in classes:
        raise SpecError(f"{field}: no class {label!r}", hint=f"ask for one of {', '.join(classes)}")
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
    # Six digits: float32 has no more, and batches of other sizes differ in the seventh.
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
