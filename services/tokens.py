"""Tokens of the job service and their roles."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

FRESH = 30.0
"""Seconds for which the result of a token check is cached; a revoked token is refused after that."""


class Role(StrEnum):
    """Permissions of a token. Each role includes the ones before it, except the last."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"
    CALL = "call"

    def allows(self, asked: Role) -> bool:
        """Return whether a token of this role may do what ``asked`` requires."""
        if self is Role.ADMIN or self is asked:
            return True
        return self is Role.SUBMIT and asked is Role.READ


class Token(BaseModel):
    """A token, without its secret."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: Role
    created: datetime
    revoked: datetime | None
    requests_per_second: float
    max_jobs: int


def authorization(secret: str | None) -> dict[str, str]:
    """Return the request header for this secret; empty if there is no secret."""
    return {"Authorization": f"Bearer {secret}"} if secret else {}
