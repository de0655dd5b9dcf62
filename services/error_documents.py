"""Errors as our servers send them and our clients read them: one document, one status for each class."""

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
"""The status of each error; of two classes that fit, the first counts."""


def status_of(error: MongeError) -> int:
    """The HTTP status of an error."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def write_error(error: MongeError, request_id: str | None = None, field: str | None = None) -> dict[str, Any]:
    """An error as the body of an answer.

    ``{"error": class, "message": …, "hint": …}``, with ``field`` where one value of the request is at fault,
    ``retry_after`` (seconds) where the server is busy, and ``request_id``, which the server's log repeats.
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
    """The error in an answer, of the class that the server raised; a :class:`ServiceError` where it is none of ours.

    Args:
        body: of the answer.
        status: of the answer.
        service: the server's name, for the message.
    """
    try:
        document = json.loads(body)
        kind, message, hint = getattr(errors, document["error"]), str(document["message"]), document.get("hint")
        if not issubclass(kind, MongeError):
            raise TypeError(kind)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ServiceError(f"{service} answered with status {status}: {body[:200]!r}")
    error: MongeError = kind(message, hint=hint)
    if isinstance(error, BusyError):
        error.retry_after = float(document.get("retry_after", 1.0))
    return error
