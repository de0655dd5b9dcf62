"""The service over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
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
from services.error_documents import STATUS
from services.gate import Gate, RemoteTokens
from services.http import protect
from services.transport import wire
from services.transport.backend import Backend
from services.transport.limits import MIB

DENSE_ENTRIES = 2**20
"""Most entries of a plan that is sent as a dense array."""

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
"""What the routes answer with beside plans, as the OpenAPI document says."""

Answer = TypeVar("Answer")


def build_app(
    backend: Backend,
    *,
    max_request: int = 64 * MIB,
    max_receiving: int = 1024 * MIB,
    loopback: bool = True,
    tokens: RemoteTokens | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
        backend: who solves.
        max_request: most bytes of a request's body.
        max_receiving: most bytes of all bodies that are being received.
        loopback: whether it listens there alone; requests of foreign pages are then refused.
        tokens: checks the token that each request for a plan then needs; None asks for none.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPIOffline(
        title="Monge: optimal transport",
        description="Optimal transport plans, each with the certificate of its quality.",
        version="1",
        lifespan=lifespan,
        responses={STATUS[kind]: {"description": kind.__doc__} for kind in REFUSALS},
    )
    intake = Intake(max_receiving)

    @app.post("/v1/plans", summary="Solve a problem", openapi_extra=_body(wire.PlanRequest))
    async def plan(request: Request, potentials: bool = False, dense: bool = False) -> Response:
        """The plan of a problem: `assignment`, or `rows`, `columns` and `mass`, with its `certificate`.

        `potentials=true` adds the dual potentials `f` and `g`, `dense=true` the plan as a matrix. The answer has the
        format of the request.
        """
        kind = _kind(request)
        limits = await backend.limits()
        async with intake.body(request, limits.json_bytes if kind == wire.JSON else None) as body:
            problem, solver = await asyncio.to_thread(wire.read_problem, body, kind, limits.input_bytes)
        n, m = problem.shape
        if dense and n * m > DENSE_ENTRIES:
            raise TooLargeError(
                f"dense: a plan of {n} × {m} received, {DENSE_ENTRIES} entries at most are sent",
                hint="take the non-zero entries",
            )
        answer = await _unless_gone(request, backend.plan(problem, _client(request), solver))
        body = await asyncio.to_thread(
            wire.write_plan, answer.between(problem), kind, potentials=potentials, dense=dense
        )
        return Response(body, media_type=kind)

    @app.post("/v1/shares", summary="Meet for a global plan", openapi_extra=_body(wire.ShareRequest))
    async def share(request: Request) -> Response:
        """This rank's rows of a plan over the points of all ranks: answered when all have come and it is solved."""
        kind = _kind(request)
        limits = await backend.limits()
        async with intake.body(request, limits.json_bytes if kind == wire.JSON else None) as body:
            brought, deadline = await asyncio.to_thread(wire.read_share, body, kind, limits.input_bytes)
        block = await _unless_gone(request, backend.bring(brought, deadline))
        return Response(await asyncio.to_thread(wire.write_rows, block, kind), media_type=kind)

    @app.get("/health", summary="Whether plans can be had")
    async def health() -> dict[str, str]:
        await backend.limits()
        return {"status": "ok"}

    @app.get("/metrics", summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(await backend.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/limits", summary="What is refused")
    async def limits() -> dict[str, float]:
        return vars(await backend.limits()) | {"request_bytes": max_request, "dense_entries": DENSE_ENTRIES}

    if tokens is not None:
        app.add_middleware(Gate, tokens=tokens)
    protect(app, max_bytes=max_request, loopback=loopback)
    return app


class Intake:
    """Receives bodies; what is received of all of them at once is bounded, beside the limit that each has by itself.

    Args:
        together: most bytes of all that are being received.
    """

    def __init__(self, together: int) -> None:
        self.together, self.receiving = together, 0

    @asynccontextmanager
    async def body(self, request: Request, limit: int | None) -> AsyncIterator[bytes]:
        """The body of a request; it counts as being received until the block is left.

        Args:
            request: whose body was not read yet.
            limit: most bytes, where the format has a lower limit than any request has.

        Raises:
            TooLargeError: it is over the limit, as soon as that shows.
            BusyError: too much is being received at once.
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
                    raise BusyError("too many requests are being received", hint="ask again in a second")
                received += chunk
                self.receiving += len(chunk)
            yield bytes(received)
        finally:
            self.receiving -= len(received)

    def _too_large(self, limit: int) -> TooLargeError:
        return TooLargeError(f"body: over the limit of {limit / MIB:g} MiB for JSON", hint="send .npz, or fewer points")


async def _unless_gone(request: Request, answer: Awaitable[Answer]) -> Answer:
    """The answer; cancelled when the client hangs up before it is there."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HTTPException(499, "the client hung up")  # for the log: nobody reads it
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
    raise ContentTypeError(f"content-type: {kind[:64]!r} received", hint=f"send {wire.NPZ} or {wire.JSON}")


def _client(request: Request) -> str:
    """Whose turn a request uses: what the client calls itself, or else its address."""
    address = request.client.host if request.client else ""
    return request.headers.get("x-monge-client", address)[:256]


def _body(model: type[wire.PlanTerms]) -> dict[str, Any]:
    """The request body in the OpenAPI document: the handlers read it themselves, within limits."""
    npz = {"type": "string", "format": "binary", "description": "numpy.savez of the same fields"}
    return {
        "requestBody": {
            "required": True,
            "content": {wire.JSON: {"schema": model.model_json_schema()}, wire.NPZ: {"schema": npz}},
        }
    }
