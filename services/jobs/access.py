"""Who may ask for what: the token of each request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request

from pipelines.errors import BusyError, ForbiddenError, UnauthenticatedError
from services.jobs.documents import Role, Token


class Access:
    """Admits requests by their tokens.

    Args:
        authenticate: the token of a secret, None where it has none.
    """

    def __init__(self, authenticate: Callable[[str], Token | None]) -> None:
        self._authenticate = authenticate
        self._buckets: dict[str, _Bucket] = {}
        self._guard = threading.Lock()

    def admit(self, request: Request, role: Role) -> Token:
        """The token of a request.

        Raises:
            UnauthenticatedError: it has none, or a worthless one.
            ForbiddenError: its role does not allow this.
            BusyError: it asks more often than it may.
        """
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        token = self._authenticate(secret.strip()) if kind.lower() == "bearer" else None
        if token is None:
            found = "a token that is not valid" if secret else "no token"
            raise UnauthenticatedError(
                f"the request has {found}", cure="set MONGE_TOKEN; `monge token create` makes one"
            )
        with self._guard:
            wait = self._buckets.setdefault(token.name, _Bucket(token.requests_per_second)).wait()
        if wait > 0:
            raise BusyError(
                f"{token.name} asks more than {token.requests_per_second:g} times a second",
                cure="ask less often",
                retry_after=wait,
            )
        if not token.role.allows(role):
            raise ForbiddenError(
                f"the token {token.name!r} has the role {token.role.value!r}, this takes {role.value!r}",
                cure=f"ask an administrator for `monge token create NAME --role {role.value}`",
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


def _needs(role: Role) -> Any:
    def admitted(request: Request) -> Token:
        access: Access = request.app.state.access
        return access.admit(request, role)

    return Depends(admitted)


Reader = Annotated[Token, _needs(Role.READ)]
Submitter = Annotated[Token, _needs(Role.SUBMIT)]
Admin = Annotated[Token, _needs(Role.ADMIN)]
"""The token of a route's request, which has to allow that much."""
