"""HTTP layer of the servers: error responses, limits of size and time, request ids, allowed hosts."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import socket
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.errors import (
    BusyError,
    ForbiddenError,
    MongeError,
    ServiceError,
    SpecError,
    TooLargeError,
    UnauthenticatedError,
)
from services.error_documents import status_of, write_error

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
"""Addresses on which a server is reachable only from its own machine."""

LOOPBACK_NAMES = LOOPBACK_HOSTS | {"testserver"}
"""Host names that a server on loopback accepts; the last is that of in-process clients."""

CONNECTIONS = 1024
"""Maximum number of concurrent requests of a server; further ones are asked to retry."""

BODY_SECONDS = 60.0
"""Time limit for receiving the body of a request, in seconds."""

_REQUEST_ID = re.compile(r"[\w.-]{1,64}")
_FIELD = re.compile(r"([a-z][\w.-]*(?:\[\d+\])?): ")

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Return whether a server on this address is reachable only from its own machine."""
    return host in LOOPBACK_HOSTS


def bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address. Bind it before starting anything that would outlive a failure.

    Raises:
        ServiceError: the address cannot be bound.
    """
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise ServiceError(f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another port") from None


def protect(app: FastAPI, *, max_bytes: int, loopback: bool = True) -> None:
    """Add error documents, limits, request ids and checks of host and origin to an app.

    Args:
        app: app that is not serving yet.
        max_bytes: maximum size of a request body in bytes.
        loopback: whether the server listens on loopback only. It then accepts only loopback host names, to refuse web
            pages whose name resolves to this machine (DNS rebinding).
    """
    app.add_middleware(Guard, max_bytes=max_bytes, hosts=LOOPBACK_NAMES if loopback else None)
    app.add_exception_handler(MongeError, _monge_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _internal)


class _Refusal(HTTPException):
    """An error while a body is read: FastAPI passes only HTTP exceptions on from there."""

    def __init__(self, error: MongeError) -> None:
        super().__init__(status_of(error), str(error.args[0]))
        self.error = error


class Guard:
    """ASGI middleware: assigns a request id, checks ``Host`` and ``Origin``, and limits the body in size and time.

    Args:
        app: ASGI application.
        max_bytes: maximum size of a body in bytes; a longer one is refused before the rest is read.
        hosts: accepted host names; None for any.
        body_seconds: time limit for receiving a body, in seconds.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, hosts: frozenset[str] | None, body_seconds: float = BODY_SECONDS
    ) -> None:
        self._app, self._max_bytes, self._hosts, self._seconds = app, max_bytes, hosts, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; see the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        if refusal := self._foreign(headers):
            await error_response(refusal, request_id)(scope, receive, named)
            return
        await self._app(scope, self._limited(headers, receive), named)

    def _foreign(self, headers: dict[bytes, str]) -> ForbiddenError | None:
        if self._hosts is None:
            return None
        for name, prefix in ((b"host", "//"), (b"origin", "")):
            if (value := headers.get(name)) is not None and not self._is_known(prefix + value):
                return ForbiddenError(
                    f"{name.decode()}: {value[:100]!r} is not a name of this server",
                    hint=f"use {', '.join(sorted(self._hosts - {'testserver'}))}",
                )
        return None

    def _is_known(self, address: str) -> bool:
        assert self._hosts is not None
        try:
            return urlsplit(address).hostname in self._hosts
        except ValueError:
            return False

    def _limited(self, headers: dict[bytes, str], receive: Receive) -> Receive:
        declared = headers.get(b"content-length", "")
        too_large = declared.isdigit() and int(declared) > self._max_bytes
        left, complete, deadline = self._max_bytes, False, asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal left, complete
            if too_large:
                raise self._refusal()
            if complete:  # any further message is a disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request did not arrive within {self._seconds:g} s") from None
            left -= len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if left < 0:
                raise self._refusal()
            return message

        return limited

    def _refusal(self) -> _Refusal:
        message = f"body: exceeds the limit of {self._max_bytes} bytes"
        return _Refusal(TooLargeError(message, hint="send a smaller body, or raise MONGE_MAX_REQUEST_MIB"))


def request_id(request: Request) -> str | None:
    """Return the id of a request, as :class:`Guard` assigned it."""
    return getattr(request.state, "request_id", None)


def field_of(error: RequestValidationError) -> str:
    """Return the field for which the validation of a request failed."""
    place = error.errors()[0]["loc"]
    return ".".join(str(part) for part in place if part not in ("body", "path", "query", "header")) or "body"


def error_response(
    error: MongeError, request_id: str | None, status: int | None = None, field: str | None = None
) -> Response:
    """Return the response for an error.

    Args:
        error: error to send.
        request_id: id of the request.
        status: HTTP status, if different from that of the error.
        field: invalid field of the request.
    """
    headers = {"Retry-After": f"{max(1, round(error.retry_after))}"} if isinstance(error, BusyError) else {}
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(write_error(error, request_id, field), status or status_of(error), headers)


async def _monge_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MongeError)
    field = _FIELD.match(str(error.args[0])) if status_of(error) in (415, 422) else None
    return error_response(error, request_id(request), field=field and field[1])


async def _http_error(request: Request, error: Exception) -> Response:
    if isinstance(error, _Refusal):
        return error_response(error.error, request_id(request))
    assert isinstance(error, HTTPException)
    response = error_response(ServiceError(str(error.detail), hint="see /docs"), request_id(request), error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    field = field_of(error)
    fault = SpecError(f"{field}: {error.errors()[0]['msg']}", hint="see /docs")
    return error_response(fault, request_id(request), field=field)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # for the log: the client has disconnected


async def _internal(request: Request, error: Exception) -> Response:
    log.error("request %s failed", request_id(request), exc_info=error)
    return error_response(ServiceError("internal error", hint="see the log of the service"), request_id(request), 500)
