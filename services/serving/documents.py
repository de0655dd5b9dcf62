"""Schemas and descriptions of the endpoint's OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DESCRIPTION = """Predictions and samples of all registered models.

A model is `NAME` (the version under the alias `live`), `NAME@ALIAS`, or a version number under
`/v1/models/NAME/versions/NUMBER`. When an alias moves in the registry, the endpoint follows within seconds, without a
restart. Errors are JSON: `{error, message, hint, field?, request_id}`.
"""


PictureFormat = Literal["png", "json"] | None
FORMAT: Any = Field(
    default=None, description="png: one image with a grid; json: base64 of the uint8 samples with their shape"
)


TRUNCATION: Any = Field(
    default=None,
    gt=0,
    le=100,
    description="maximum absolute latent coordinate, sampled from a truncated normal distribution; lower values give "
    "more typical, less varied samples; not truncated by default",
)


class GenerateRequest(BaseModel):
    """Parameters of samples; the same seed gives the same samples."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"count": 16, "seed": 0}]})

    count: int = Field(default=16, ge=1, description="samples")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the latent vectors")
    label: str | None = Field(
        default=None, description="class to sample from a conditional model; all classes in turn by default"
    )
    truncation: float | None = TRUNCATION
    format: PictureFormat = FORMAT


class PathRequest(BaseModel):
    """Interpolation between two classes; the same seed gives the same images."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"start": "cat", "end": "dog"}]})

    start: str = Field(description="class at the start of each path")
    end: str = Field(description="class at the end of each path")
    steps: int = Field(default=8, ge=2, description="number of images per path, including both ends")
    count: int = Field(default=4, ge=1, description="number of paths, one per row")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the latent vectors, one per path")
    truncation: float | None = TRUNCATION
    format: PictureFormat = FORMAT


class Problem(BaseModel):
    """Response to a request that failed."""

    error: str = Field(description="name of the error class", examples=["SpecError"])
    message: str
    hint: str | None
    field: str | None = Field(default=None, description="invalid field of the request")
    retry_after: float | None = Field(default=None, description="seconds until a retry, if the endpoint is busy")
    request_id: str


ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "the token is missing or invalid"},
    403: {"model": Problem, "description": "the role of the token is not sufficient, or the origin is not allowed"},
    404: {"model": Problem, "description": "the model is not registered; the hint lists the registered models"},
    413: {"model": Problem, "description": "the request is too large"},
    415: {"model": Problem, "description": "the content type is not supported"},
    422: {"model": Problem, "description": "a field is invalid"},
    429: {"model": Problem, "description": "the endpoint is busy; retry after `Retry-After` seconds"},
    503: {"model": Problem, "description": "the registry is unreachable, or the model cannot be loaded"},
}

_PREDICTED = {
    "model": "cats",
    "version": 3,
    "predictions": [{"class": "cat", "probability": 0.98, "probabilities": {"cat": 0.98, "dog": 0.02}}],
}

PREDICT: dict[str, Any] = {
    "responses": ERRORS
    | {200: {"description": "one prediction per image", "content": {"application/json": {"example": _PREDICTED}}}},
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
