"""HTTP API of the transport service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi_offline import FastAPIOffline

from pipelines.errors import (
    BusyError,
    ContentTypeError,
    ForbiddenError,
    MongeError,
    ProblemError,
    RendezvousError,
    ServiceError,
    TooLargeError,
    UnauthenticatedError,
)
from services.error_documents import DESCRIPTIONS, STATUS
from services.gate import Gate, RemoteTokens
from services.http import protect
from services.transport import wire
from services.transport.backend import Backend
from services.transport.limits import MIB

DENSE_ENTRIES = 2**20
"""Maximum number of entries of a plan sent as a dense array."""

REFUSALS: tuple[type[MongeError], ...] = (
    UnauthenticatedError,
    ForbiddenError,
    RendezvousError,
    TooLargeError,
    ContentTypeError,
    ProblemError,
    BusyError,
    ServiceError,
)
"""Responses of the routes in the OpenAPI document."""

Answer = TypeVar("Answer")


def build_app(
    backend: Backend,
    *,
    max_request: int = 64 * MIB,
    max_receiving: int = 1024 * MIB,
    loopback: bool = True,
    tokens: RemoteTokens | None = None,
) -> FastAPI:
    """Return the ASGI application.

    Args:
        backend: backend that solves the problems.
        max_request: maximum size of a request body in bytes.
        max_receiving: maximum size of all bodies being received, in bytes.
        loopback: whether the server listens on loopback only; requests from other origins are then refused.
        tokens: token check for requests for plans; None if no token is required.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPIOffline(
        title="Monge: optimal transport",
        description="Optimal transport plans, each with a certificate of its accuracy.",
        version="1",
        lifespan=lifespan,
        responses={STATUS[kind]: {"description": DESCRIPTIONS[STATUS[kind]]} for kind in REFUSALS},
    )
    intake = Intake(max_receiving)

    @app.post("/v1/plans", summary="Solve a transport problem", openapi_extra=_body(wire.PlanRequest))
    async def plan(request: Request, potentials: bool = False, dense: bool = False) -> Response:
        """Return a plan as `assignment`, or as `rows`, `columns` and `mass`, with its `certificate`.

        `potentials=true` adds the dual potentials `f` and `g`; `dense=true` returns the plan as a matrix. The response
        has the format of the request.
        """
        kind = _kind(request)
        limits = await backend.limits()
        async with intake.body(request, limits.json_bytes if kind == wire.JSON else None) as body:
            problem, solver = await asyncio.to_thread(wire.read_problem, body, kind, limits.input_bytes)
        n, m = problem.shape
        if dense and n * m > DENSE_ENTRIES:
            raise TooLargeError(
                f"dense: the plan has {n} × {m} entries, the maximum is {DENSE_ENTRIES}",
                hint="request the non-zero entries",
            )
        answer = await _unless_gone(request, backend.plan(problem, _client(request), solver))
        body = await asyncio.to_thread(
            wire.write_plan, answer.between(problem), kind, potentials=potentials, dense=dense
        )
        return Response(body, media_type=kind)

    @app.post("/v1/shares", summary="Solve a global transport problem", openapi_extra=_body(wire.ShareRequest))
    async def share(request: Request) -> Response:
        """Return this rank's rows of a plan over the points of all ranks, after all ranks have sent their shares."""
        kind = _kind(request)
        limits = await backend.limits()
        async with intake.body(request, limits.json_bytes if kind == wire.JSON else None) as body:
            brought, deadline = await asyncio.to_thread(wire.read_share, body, kind, limits.input_bytes)
        block = await _unless_gone(request, backend.bring(brought, deadline))
        return Response(await asyncio.to_thread(wire.write_rows, block, kind), media_type=kind)

    @app.get("/health", summary="Check that the service can solve problems")
    async def health() -> dict[str, str]:
        await backend.limits()
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(await backend.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/limits", summary="Get the limits on requests")
    async def limits() -> dict[str, float]:
        return vars(await backend.limits()) | {"request_bytes": max_request, "dense_entries": DENSE_ENTRIES}

    if tokens is not None:
        app.add_middleware(Gate, tokens=tokens)
    protect(app, max_bytes=max_request, loopback=loopback)
    return app


class Intake:
    """Receives request bodies, with a limit on the total size of all bodies being received.

    Args:
        together: maximum size of all bodies being received, in bytes.
    """

    def __init__(self, together: int) -> None:
        self.together, self.receiving = together, 0

    @asynccontextmanager
    async def body(self, request: Request, limit: int | None) -> AsyncIterator[bytes]:
        """Yield the body of a request; it counts as being received until the block ends.

        Args:
            request: request with an unread body.
            limit: maximum size in bytes, if lower than the limit of all requests.

        Raises:
            TooLargeError: the body exceeds the limit; raised as soon as it does.
            BusyError: the total size of all bodies exceeds the limit.
        """
        declared = request.headers.get("content-length", "")
        if limit is not None and declared.isdigit() and int(declared) > limit:
            raise self._too_large(limit)
        received = bytearray()
        try:
            async for chunk in request.stream():
                if limit is not None and len(received) + len(chunk) > limit:
                    raise self._too_large(limit)
                if self.receiving + len(chunk) > self.together:
                    raise BusyError("too many requests are being received", hint="retry in a second")
                received += chunk
                self.receiving += len(chunk)
            yield bytes(received)
        finally:
            self.receiving -= len(received)

    def _too_large(self, limit: int) -> TooLargeError:
        return TooLargeError(f"body: exceeds the limit of {limit / MIB:g} MiB for JSON", hint="send .npz or less")


async def _unless_gone(request: Request, answer: Awaitable[Answer]) -> Answer:
    """Return the response; cancel it if the client disconnects first."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HTTPException(499, "client disconnected")  # for the log
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _kind(request: Request) -> str:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == wire.JSON:
        return wire.JSON
    if kind in (wire.NPZ, "application/zip", "application/octet-stream"):
        return wire.NPZ
    raise ContentTypeError(f"content-type: received {kind[:64]!r}", hint=f"send {wire.NPZ} or {wire.JSON}")


def _client(request: Request) -> str:
    """Return the client whose turn a request uses: its name for itself, or its address."""
    address = request.client.host if request.client else ""
    return request.headers.get("x-monge-client", address)[:256]


def _body(model: type[wire.PlanTerms]) -> dict[str, Any]:
    """Return the OpenAPI description of the request body, which the handlers read themselves to apply limits."""
    npz = {"type": "string", "format": "binary", "description": "archive written by numpy.savez with the same fields"}
    return {
        "requestBody": {
            "required": True,
            "content": {wire.JSON: {"schema": model.model_json_schema()}, wire.NPZ: {"schema": npz}},
        }
    }
