"""Access control: the role that the token of a request must have."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Depends, Request

from services.gate import Access, bearer
from services.tokens import Role, Token


def _needs(role: Role | None) -> Any:
    async def admitted(request: Request) -> Token:
        state, secret = request.app.state, bearer(request)
        access: Access = state.access
        token: Token | None = None
        if secret:
            token = state.authenticated(secret) or await asyncio.to_thread(state.authenticate, secret)
        return access.admit(request, token, role)

    return Depends(admitted)


AnyToken = Annotated[Token, _needs(None)]
ReadToken = Annotated[Token, _needs(Role.READ)]
SubmitToken = Annotated[Token, _needs(Role.SUBMIT)]
AdminToken = Annotated[Token, _needs(Role.ADMIN)]
"""Token of the request; its role must allow the route."""
