"""Who may ask our servers for what: requests are admitted by their tokens, which the job service checks."""

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
"""Seconds for which a known token goes on being accepted while the job service is away."""

PAUSE = 5.0
"""Seconds between two tries to reach a job service that is away, for a known token."""

CACHED = 1024
"""Most tokens that are remembered."""

ASKING = 5.0
"""Seconds for the job service's answer."""

OPEN = frozenset({"/health", "/ready", "/metrics", "/docs", "/openapi.json"})
"""Paths that need no token: those of probes and Prometheus, and the description of the API."""

OPEN_FILES = "/static-offline-docs/"
"""Where the scripts of ``/docs`` lie."""


def bearer(request: Request) -> str:
    """The secret that a request carries, empty where it has none."""
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else ""


class Access:
    """Admits requests by their tokens, each as often as its token may ask."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._guard = threading.Lock()

    def admit(self, request: Request, token: Token | None, role: Role | None) -> Token:
        """Admit a request, or refuse it.

        Args:
            request: to note its token in.
            token: of the request; None where it has none, or an invalid one.
            role: that it takes; None for any.

        Raises:
            UnauthenticatedError: there is no token.
            ForbiddenError: its role does not allow this.
            BusyError: it asks more often than it may.
        """
        if token is None:
            found = "a token that is not valid" if bearer(request) else "no token"
            raise UnauthenticatedError(
                f"the request has {found}", hint="set MONGE_TOKEN; `monge token create` makes one"
            )
        with self._guard:
            wait = self._buckets.setdefault(token.name, _Bucket(token.requests_per_second)).wait()
        if wait > 0:
            raise BusyError(
                f"{token.name} asks more than {token.requests_per_second:g} times a second",
                hint="ask less often",
                retry_after=wait,
            )
        if role is not None and not token.role.allows(role):
            raise ForbiddenError(
                f"the token {token.name!r} has the role {token.role.value!r}, this takes {role.value!r}",
                hint=f"ask an administrator for `monge token create NAME --role {role.value}`",
            )
        request.state.token = token
        return token


class _Bucket:
    """Allows so many requests a second on average, and twice as many at once."""

    def __init__(self, rate: float) -> None:
        self._rate, self._full = rate, max(2 * rate, 2.0)
        self._level, self._at = self._full, time.monotonic()

    def wait(self) -> float:
        """Seconds until the next request is allowed; 0 where this one is, which then counts."""
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
    """When the job service is to be asked again."""


class RemoteTokens:
    """Tokens that the job service checks, cached by their digests.

    Args:
        url: of the job service.
        transport: of httpx, for a job service inside this process.
        clock: seconds, as those of ``time.monotonic``.
    """

    def __init__(
        self,
        url: str,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        # No proxy from the environment, which would see the tokens: the service is a neighbour.
        self._client = httpx.AsyncClient(base_url=self._url, timeout=ASKING, trust_env=False, transport=transport)
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Token | None]] = {}

    async def authenticate(self, secret: str) -> Token | None:
        """The token of a secret, None where it has none or a revoked one.

        Raises:
            ServiceError: the job service is away, and the token not known.
            BusyError: the job service is busy, and the token not known.
        """
        if not secret or not secret.isascii():  # no other can be sent on
            return None
        digest = hashlib.sha256(secret.encode()).digest()
        known = self._known.get(digest)
        if known is not None and self._clock() < known.due:
            self._known.move_to_end(digest)
            return known.token
        # Requests that come meanwhile wait for the same answer; one that is given up leaves it to the others.
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
                f"the job service at {self._url}, which checks tokens, does not answer: {reason}",
                hint="see `monge status`; set MONGE_JOBS_URL",
            )
        known, now = self._known.get(digest), self._clock()
        if known is None or now - known.confirmed >= KEPT:
            # Another class would tell a client that its own request is at fault.
            raise fault if isinstance(fault, BusyError) else ServiceError(str(fault.args[0]), hint=fault.hint)
        known.due = min(now + PAUSE, known.confirmed + KEPT)
        return known.token


class Gate:
    """ASGI middleware: lets requests pass whose token has the role ``call``; a stranger's body is not read.

    Args:
        app: the application.
        tokens: checks them.
    """

    def __init__(self, app: ASGIApp, tokens: RemoteTokens) -> None:
        self._app, self._tokens, self._access = app, tokens, Access()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
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
    """What checks the tokens of a server that listens on ``host``; None on loopback, where none is asked for.

    Raises:
        ServiceError: others reach the server, and no job service is known.
    """
    if is_loopback(host):
        return None
    try:
        return RemoteTokens(settings.address("jobs_url"))
    except ServiceError:
        raise ServiceError(
            f"host: {host} received, where others reach the server, and no job service is known to check their tokens",
            hint="set MONGE_JOBS_URL, or listen on 127.0.0.1 behind a proxy",
        ) from None
