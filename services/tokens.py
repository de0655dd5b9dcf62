"""Tokens of the job service and their roles."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

FRESH = 30.0
"""Seconds for which a token counts as it was checked; one that is revoked elsewhere is refused after that."""


class Role(StrEnum):
    """What a token allows, each what the ones before it do, but for the last."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"
    CALL = "call"

    def allows(self, asked: Role) -> bool:
        """Whether a token of this role may do what ``asked`` stands for."""
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
    """The header of a request with this secret; none without one."""
    return {"Authorization": f"Bearer {secret}"} if secret else {}
