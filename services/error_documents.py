"""JSON error documents of the servers, and the HTTP status of each error class."""

from __future__ import annotations

import json
from typing import Any

from pipelines import errors
from pipelines.errors import (
    BusyError,
    CheckpointError,
    ConflictError,
    ContentTypeError,
    DataError,
    ForbiddenError,
    JobNotFoundError,
    ModelNotFoundError,
    MongeError,
    NotConvergedError,
    ProblemError,
    RendezvousError,
    ServiceError,
    SpecError,
    TooLargeError,
    UnauthenticatedError,
)

STATUS: dict[type[MongeError], int] = {
    UnauthenticatedError: 401,
    ForbiddenError: 403,
    JobNotFoundError: 404,
    ModelNotFoundError: 404,
    ConflictError: 409,
    RendezvousError: 409,
    TooLargeError: 413,
    ContentTypeError: 415,
    SpecError: 422,
    DataError: 422,
    ProblemError: 422,
    NotConvergedError: 422,
    BusyError: 429,
    CheckpointError: 503,
    ServiceError: 503,
}
"""HTTP status of each error class; the first matching class counts."""

DESCRIPTIONS = {
    401: "the token is missing or invalid",
    403: "the role of the token is not sufficient, or the origin is not allowed",
    404: "not found",
    409: "the request conflicts with the current state",
    413: "the request is too large",
    415: "the content type is not supported",
    422: "a field is invalid",
    429: "the server is busy; retry after `Retry-After` seconds",
    503: "a service is unreachable",
}
"""Description of each status for OpenAPI documents."""


def status_of(error: MongeError) -> int:
    """Return the HTTP status of an error."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def write_error(error: MongeError, request_id: str | None = None, field: str | None = None) -> dict[str, Any]:
    """Return an error as the body of a response.

    ``{"error": class, "message": …, "hint": …}``, with ``field`` if one field of the request is invalid,
    ``retry_after`` (seconds) if the server is busy, and ``request_id``, which is also in the server's log.
    """
    document: dict[str, Any] = {"error": type(error).__name__, "message": str(error.args[0]), "hint": error.hint}
    if isinstance(error, BusyError):
        document["retry_after"] = error.retry_after
    if field is not None:
        document["field"] = field
    if request_id is not None:
        document["request_id"] = request_id
    return document


def read_error(body: bytes, status: int, service: str) -> MongeError:
    """Return the error in a response, as the class that the server raised, or as a :class:`ServiceError` if unknown.

    Args:
        body: body of the response.
        status: status of the response.
        service: name of the server, for the message.
    """
    try:
        document = json.loads(body)
        kind, message, hint = getattr(errors, document["error"]), str(document["message"]), document.get("hint")
        if not issubclass(kind, MongeError):
            raise TypeError(kind)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ServiceError(f"{service} responded with status {status}: {body[:200]!r}")
    error: MongeError = kind(message, hint=hint)
    if isinstance(error, BusyError):
        error.retry_after = float(document.get("retry_after", 1.0))
    return error
