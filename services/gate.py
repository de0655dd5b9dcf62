"""Access control of the servers: tokens of requests, checked by the job service."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import httpx
from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.errors import BusyError, ForbiddenError, MongeError, ServiceError, UnauthenticatedError
from services.error_documents import read_error
from services.http import error_response, is_loopback, request_id
from services.settings import Settings
from services.tokens import FRESH, Role, Token, authorization

KEPT = 600.0
"""Seconds for which a cached token is accepted while the job service is unreachable."""

PAUSE = 5.0
"""Seconds between tries to reach the job service for a cached token."""

CACHED = 1024
"""Maximum number of cached tokens."""

ASKING = 5.0
"""Timeout of a request to the job service in seconds."""

OPEN = frozenset({"/health", "/ready", "/metrics", "/docs", "/openapi.json"})
"""Paths that require no token: probes, Prometheus metrics, and the API description."""

OPEN_FILES = "/static-offline-docs/"
"""Path of the scripts of ``/docs``."""


def bearer(request: Request) -> str:
    """Return the secret of a request; empty if it has none."""
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else ""


class Access:
    """Admits requests by their tokens and limits the rate of each token."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._guard = threading.Lock()

    def admit(self, request: Request, token: Token | None, role: Role | None) -> Token:
        """Admit a request or raise.

        Args:
            request: request; its state receives the token.
            token: token of the request; None if it is missing or invalid.
            role: required role; None for any.

        Raises:
            UnauthenticatedError: the token is missing or invalid.
            ForbiddenError: the role of the token is not sufficient.
            BusyError: the token exceeds its rate limit.
        """
        if token is None:
            found = "an invalid token" if bearer(request) else "no token"
            raise UnauthenticatedError(
                f"the request has {found}", hint="set MONGE_TOKEN to a token from `monge token create`"
            )
        with self._guard:
            wait = self._buckets.setdefault(token.name, _Bucket(token.requests_per_second)).wait()
        if wait > 0:
            raise BusyError(
                f"{token.name} exceeds {token.requests_per_second:g} requests per second",
                hint="send requests less often",
                retry_after=wait,
            )
        if role is not None and not token.role.allows(role):
            raise ForbiddenError(
                f"the token {token.name!r} has the role {token.role.value!r}, this request requires {role.value!r}",
                hint=f"ask an administrator for `monge token create NAME --role {role.value}`",
            )
        request.state.token = token
        return token


class _Bucket:
    """Token bucket: allows a number of requests per second on average, and bursts of twice that number."""

    def __init__(self, rate: float) -> None:
        self._rate, self._full = rate, max(2 * rate, 2.0)
        self._level, self._at = self._full, time.monotonic()

    def wait(self) -> float:
        """Return the seconds until the next request is allowed; if 0, count the request."""
        now = time.monotonic()
        self._level, self._at = min(self._full, self._level + (now - self._at) * self._rate), now
        if self._level < 1:
            return (1 - self._level) / self._rate
        self._level -= 1
        return 0.0


@dataclass
class _Known:
    token: Token
    confirmed: float
    due: float
    """Time of the next query to the job service."""


class RemoteTokens:
    """Check tokens with the job service, and cache the results by digest.

    Args:
        url: URL of the job service.
        transport: httpx transport, for a job service in this process.
        clock: clock in seconds; ``time.monotonic`` by default.
    """

    def __init__(
        self,
        url: str,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        # Ignore proxies from the environment: they would see the tokens.
        self._client = httpx.AsyncClient(base_url=self._url, timeout=ASKING, trust_env=False, transport=transport)
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Token | None]] = {}

    async def authenticate(self, secret: str) -> Token | None:
        """Return the token of a secret; None if there is none or it was revoked.

        Raises:
            ServiceError: the job service is unreachable, and the token is not cached.
            BusyError: the job service is busy, and the token is not cached.
        """
        if not secret or not secret.isascii():  # others cannot be sent in a header
            return None
        digest = hashlib.sha256(secret.encode()).digest()
        known = self._known.get(digest)
        if known is not None and self._clock() < known.due:
            self._known.move_to_end(digest)
            return known.token
        # Concurrent requests share one query; a cancelled request does not cancel it.
        if digest not in self._asking:
            self._asking[digest] = asyncio.create_task(self._ask(digest, secret))
            self._asking[digest].add_done_callback(lambda _: self._asking.pop(digest))
        return await asyncio.shield(self._asking[digest])

    async def _ask(self, digest: bytes, secret: str) -> Token | None:
        fault: MongeError
        try:
            found = await self._client.get("/v1/tokens/self", headers=authorization(secret))
            if found.status_code == 401:
                self._known.pop(digest, None)
                return None
            if found.status_code == 200:
                token = Token.model_validate_json(found.content)
                now = self._clock()
                self._known[digest] = _Known(token, now, now + FRESH)
                self._known.move_to_end(digest)
                while len(self._known) > CACHED:
                    self._known.popitem(last=False)
                return token
            fault = read_error(found.content, found.status_code, "the job service")
        except (httpx.HTTPError, ValueError) as error:
            reason = error or type(error).__name__
            fault = ServiceError(
                f"cannot check the token: the job service at {self._url} is unreachable: {reason}",
                hint="check `monge status` and MONGE_JOBS_URL",
            )
        known, now = self._known.get(digest), self._clock()
        if known is None or now - known.confirmed >= KEPT:
            # Another class would blame the client's request.
            raise fault if isinstance(fault, BusyError) else ServiceError(str(fault.args[0]), hint=fault.hint)
        known.due = min(now + PAUSE, known.confirmed + KEPT)
        return known.token


class Gate:
    """ASGI middleware: passes requests whose token has the role ``call``, and refuses others before reading the body.

    Args:
        app: ASGI application.
        tokens: checks tokens.
    """

    def __init__(self, app: ASGIApp, tokens: RemoteTokens) -> None:
        self._app, self._tokens, self._access = app, tokens, Access()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; see the ASGI specification."""
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"].startswith(OPEN_FILES):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            self._access.admit(request, await self._tokens.authenticate(bearer(request)), Role.CALL)
        except MongeError as error:
            await error_response(error, request_id(request))(scope, receive, send)
            return
        await self._app(scope, receive, send)


def tokens_for(host: str, settings: Settings) -> RemoteTokens | None:
    """Return the token check of a server that listens on ``host``; None on loopback, where no token is required.

    Raises:
        ServiceError: the server is reachable from other machines, and no job service is configured.
    """
    if is_loopback(host):
        return None
    try:
        return RemoteTokens(settings.address("jobs_url"))
    except ServiceError:
        raise ServiceError(
            f"host: {host} is reachable from other machines, but no job service is configured to check tokens",
            hint="set MONGE_JOBS_URL, or listen on 127.0.0.1 behind a proxy",
        ) from None
