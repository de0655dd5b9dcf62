"""What the endpoint's OpenAPI pages say of bodies and answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DESCRIPTION = """Every registered model behind one address.

A model is `NAME` (the version under the alias `live`), `NAME@ALIAS`, or a version by number under
`/v1/models/NAME/versions/NUMBER`. When an alias moves in the registry, the endpoint follows within seconds, without a
restart. Errors are JSON: `{error, message, hint, field?, request_id}`.
"""


PictureFormat = Literal["png", "json"] | None
FORMAT: Any = Field(
    default=None, description="png: one picture, a grid; json: base64 of the uint8 samples with their shape"
)


TRUNCATION: Any = Field(
    default=None,
    gt=0,
    le=100,
    description="largest coordinate of the latent vectors, which are drawn from the truncated normal law: the lower, "
    "the more typical the samples, and the less they differ; by default they are not truncated",
)


class GenerateRequest(BaseModel):
    """What to draw from a generator; the same seed gives the same samples."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"count": 16, "seed": 0}]})

    count: int = Field(default=16, ge=1, description="samples")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the latent vectors")
    label: str | None = Field(
        default=None, description="the class to draw, of a conditional model; one after the other by default"
    )
    truncation: float | None = TRUNCATION
    format: PictureFormat = FORMAT


class PathRequest(BaseModel):
    """A way from images of one class to images of another; the same seed gives the same way."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"start": "cat", "end": "dog"}]})

    start: str = Field(description="the class at which every path begins")
    end: str = Field(description="the class at which it ends")
    steps: int = Field(default=8, ge=2, description="images on a path, both ends included")
    count: int = Field(default=4, ge=1, description="paths, one below the other in the picture")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the latent vectors, one for each path")
    truncation: float | None = TRUNCATION
    format: PictureFormat = FORMAT


class Problem(BaseModel):
    """An answer to a request that failed."""

    error: str = Field(description="the name of its class", examples=["SpecError"])
    message: str
    hint: str | None
    field: str | None = Field(default=None, description="of the request, where one is at fault")
    retry_after: float | None = Field(default=None, description="seconds, where it is busy")
    request_id: str


ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "no valid token, where the endpoint asks for one"},
    403: {"model": Problem, "description": "the token's role is another, or the request comes from a foreign page"},
    404: {"model": Problem, "description": "no such model; the hint lists those there are"},
    413: {"model": Problem, "description": "the request is too large"},
    415: {"model": Problem, "description": "the content type is not understood"},
    422: {"model": Problem, "description": "a field is wrong"},
    429: {"model": Problem, "description": "too busy; `Retry-After` says when to come back"},
    503: {"model": Problem, "description": "the registry is away, or the model cannot be loaded"},
}

_PREDICTED = {
    "model": "cats",
    "version": 3,
    "predictions": [{"class": "cat", "probability": 0.98, "probabilities": {"cat": 0.98, "dog": 0.02}}],
}

PREDICT: dict[str, Any] = {
    "responses": ERRORS
    | {200: {"description": "one prediction an image", "content": {"application/json": {"example": _PREDICTED}}}},
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "images": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        },
                    }
                },
                "image/png": {"schema": {"type": "string", "format": "binary"}},
                "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["images"],
                        "properties": {
                            "images": {
                                "description": "(k, c, h, w) integers 0…255 as nested lists, or base64 of their bytes",
                                "oneOf": [{"type": "array", "items": {}}, {"type": "string", "format": "byte"}],
                            }
                        },
                    },
                    "example": {"images": [[[[0, 255], [255, 0]]]]},
                },
            },
        }
    },
}

GENERATE: dict[str, Any] = {
    "responses": ERRORS
    | {
        200: {
            "description": "a grid of samples, or the samples",
            "content": {
                "image/png": {"schema": {"type": "string", "format": "binary"}},
                "application/json": {
                    "example": {"model": "faces", "version": 1, "shape": [16, 1, 28, 28], "images": "AAEC…"}
                },
            },
        }
    },
}
