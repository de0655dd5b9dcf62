"""Who may ask for what: the token of each request."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from services.tokens import Access, Role, Token, bearer


def _needs(role: Role | None) -> Any:
    def admitted(request: Request) -> Token:
        access: Access = request.app.state.access
        secret = bearer(request)
        return access.admit(request, request.app.state.authenticate(secret) if secret else None, role)

    return Depends(admitted)


Anyone = Annotated[Token, _needs(None)]
Reader = Annotated[Token, _needs(Role.READ)]
Submitter = Annotated[Token, _needs(Role.SUBMIT)]
Admin = Annotated[Token, _needs(Role.ADMIN)]
"""The token of a route's request, which has to allow that much."""
