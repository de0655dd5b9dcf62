"""Base class and types shared by all sections of a spec."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
ModelReference = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9._-]+|/[0-9]+)?$")]
ImageCount = Annotated[int, Field(ge=1, description="duration in images seen by the whole job")]


class Section(BaseModel):
    """Base class of sections: frozen, without unknown fields or non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
