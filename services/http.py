"""The HTTP layer of our servers: error answers, limits of size and time, request ids, known hosts."""

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
"""Addresses on which a server is reached from its own machine alone."""

LOOPBACK_NAMES = LOOPBACK_HOSTS | {"testserver"}
"""Names under which a server on loopback answers; the last is that of clients inside the process."""

CONNECTIONS = 1024
"""Requests that a server answers at once; more are told to come back."""

BODY_SECONDS = 60.0
"""Seconds in which a request's body has to arrive."""

_REQUEST_ID = re.compile(r"[\w.-]{1,64}")
_FIELD = re.compile(r"([a-z][\w.-]*(?:\[\d+\])?): ")

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether a server that listens on this address is reached from its own machine alone."""
    return host in LOOPBACK_HOSTS


def bound(host: str, port: int) -> socket.socket:
    """A socket of that address: taken before anything is started that a taken port would leave behind.

    Raises:
        ServiceError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise ServiceError(f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another port") from None


def protect(app: FastAPI, *, max_bytes: int, loopback: bool = True) -> None:
    """Give an app the error document, limits, request ids and the check of where requests come from.

    Args:
        app: before it serves.
        max_bytes: most bytes of a request's body.
        loopback: whether the server listens there alone. It then answers only under names of loopback: a page
            elsewhere whose name is made to point here (DNS rebinding) is refused.
    """
    app.add_middleware(Guard, max_bytes=max_bytes, hosts=LOOPBACK_NAMES if loopback else None)
    app.add_exception_handler(MongeError, _monge_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _internal)


class _Refusal(HTTPException):
    """An error met while a body is read: FastAPI hands on none but HTTP exceptions from there."""

    def __init__(self, error: MongeError) -> None:
        super().__init__(status_of(error), str(error.args[0]))
        self.error = error


class Guard:
    """ASGI middleware: names the request, checks its ``Host`` and ``Origin``, and bounds its body in size and time.

    Args:
        app: the application.
        max_bytes: most bytes of a body; a longer one is refused before the rest of it is read.
        hosts: names under which the server answers; None for any.
        body_seconds: seconds in which a body has to arrive.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, hosts: frozenset[str] | None, body_seconds: float = BODY_SECONDS
    ) -> None:
        self._app, self._max_bytes, self._hosts, self._seconds = app, max_bytes, hosts, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
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
                    f"{name.decode()}: {value[:100]!r} is not this server's",
                    hint=f"ask it as {', '.join(sorted(self._hosts - {'testserver'}))}",
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
            if complete:  # what follows is the client hanging up, whenever that is
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
        message = f"body: over the limit of {self._max_bytes} bytes"
        return _Refusal(TooLargeError(message, hint="send less, or raise MONGE_MAX_REQUEST_MIB"))


def request_id(request: Request) -> str | None:
    """The id of a request, as :class:`Guard` chose it."""
    return getattr(request.state, "request_id", None)


def field_of(error: RequestValidationError) -> str:
    """The field that a request's validation failed on."""
    place = error.errors()[0]["loc"]
    return ".".join(str(part) for part in place if part not in ("body", "path", "query", "header")) or "body"


def error_response(
    error: MongeError, request_id: str | None, status: int | None = None, field: str | None = None
) -> Response:
    """An error as an answer.

    Args:
        error: to tell.
        request_id: of the request.
        status: another one than the error's own.
        field: of the request that is at fault.
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
    return Response(status_code=499)  # for the log: nobody reads it


async def _internal(request: Request, error: Exception) -> Response:
    log.error("request %s failed", request_id(request), exc_info=error)
    return error_response(ServiceError("the service failed", hint="its log says why"), request_id(request), 500)
