"""Errors that Monge raises.

::

    MongeError
    ├── SpecError                   a job spec or a setting is wrong
    │   └── ContentTypeError        the content type of a request is not supported (HTTP 415)
    ├── DataError
    │   ├── SourceError             a source of images cannot be found, fetched or verified
    │   ├── CorruptImageError       one image cannot be decoded
    │   ├── TooManyBadImagesError   more images are unreadable than the spec allows
    │   └── ShardError              a shard or its manifest is missing or does not match its hash
    ├── TransportError
    │   ├── ProblemError            points, weights, cost or epsilon are not a valid problem
    │   ├── NotConvergedError       a solver did not reach the requested accuracy
    │   ├── CertificateError        a plan does not match its certificate
    │   ├── RendezvousError         a rank did not send its share before the deadline
    │   ├── TooLargeError           the problem exceeds the service's limits (HTTP 413)
    │   └── BusyError               the service's queue is full (HTTP 429, with Retry-After)
    ├── TrainingError
    │   ├── CheckpointError         a checkpoint is missing, damaged or of another spec
    │   ├── DivergedError           a loss, a weight or a sample is not finite
    │   ├── RankError               another rank failed, was lost or missed a deadline
    │   └── SupersededError         a later attempt at the job has started
    └── ServiceError                a service is not reachable or returns an invalid response
        ├── UnauthenticatedError    a request has no valid token (HTTP 401)
        ├── ForbiddenError          a request is not allowed for its token or its origin (HTTP 403)
        ├── JobNotFoundError        no job has that id (HTTP 404)
        ├── ConflictError           a request conflicts with the state of a job or an earlier request (HTTP 409)
        ├── ModelNotFoundError      no registered model has that name, alias or version (HTTP 404)
        └── StorageError            an object store rejects a request, fails or does not respond
            └── ObjectNotFoundError     the object or bucket does not exist

A message describes the problem with the value received; ``hint`` describes the fix. The command line prints both, and a
traceback only with ``--debug``.
"""

from __future__ import annotations


class MongeError(Exception):
    """Base class of all errors.

    Args:
        message: description of the problem, with the value received.
        hint: description of the fix.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  hint: {self.hint}" if self.hint else message


class SpecError(MongeError):
    """A job spec or a setting is wrong."""


class ContentTypeError(SpecError):
    """The content type of a request is not supported."""


class DataError(MongeError):
    """Images or their metadata are wrong."""


class SourceError(DataError):
    """A source of images cannot be found, fetched or verified."""


class CorruptImageError(DataError):
    """One image cannot be decoded."""


class TooManyBadImagesError(DataError):
    """More images are unreadable than ``data.max_bad_fraction`` allows."""


class ShardError(DataError):
    """A shard or its manifest is missing or does not match its hash."""


class TransportError(MongeError):
    """A transport plan could not be computed."""


class ProblemError(TransportError):
    """Points, weights, cost or epsilon are not a valid transport problem."""


class NotConvergedError(TransportError):
    """A solver did not reach the requested accuracy."""


class CertificateError(TransportError):
    """A plan does not match its certificate."""


class RendezvousError(TransportError):
    """A rank did not send its share of a global problem before the deadline."""


class TooLargeError(TransportError):
    """The problem exceeds the service's limits."""


class BusyError(TransportError):
    """The service's queue is full.

    Args:
        retry_after: seconds until the queue is expected to have room.
    """

    def __init__(self, message: str, *, hint: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class TrainingError(MongeError):
    """A training run cannot continue."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, damaged or of another spec."""


class DivergedError(TrainingError):
    """A loss, a weight or a sample is not finite."""


class RankError(TrainingError):
    """Another rank failed, was lost or missed a deadline."""


class SupersededError(TrainingError):
    """A later attempt at the job has started; this attempt must not write any more."""


class ServiceError(MongeError):
    """A service is not reachable or returns an invalid response."""


class UnauthenticatedError(ServiceError):
    """A request has no valid token."""


class ForbiddenError(ServiceError):
    """A request is not allowed for the role of its token, or comes from a page of another origin."""


class JobNotFoundError(ServiceError):
    """No job has that id."""


class ConflictError(ServiceError):
    """A request conflicts with the state of a job or with an earlier request with the same key."""


class ModelNotFoundError(ServiceError):
    """No registered model has that name, alias or version."""


class StorageError(ServiceError):
    """An object store rejects a request, fails or does not respond."""


class ObjectNotFoundError(StorageError):
    """The object or bucket does not exist."""
