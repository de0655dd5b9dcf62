"""Every error that Monge raises on purpose.

::

    MongeError
    ├── SpecError                   a job spec or a setting is wrong
    │   └── ContentTypeError        a request's body has a type that is not taken (HTTP 415)
    ├── DataError
    │   ├── SourceError             a source of images cannot be found, fetched or trusted
    │   ├── CorruptImageError       one image cannot be decoded
    │   ├── TooManyBadImagesError   more images were set aside than the spec allows
    │   └── ShardError              a shard or its manifest is missing or does not match its hash
    ├── TransportError
    │   ├── ProblemError            points, weights, cost or epsilon do not make a problem
    │   ├── NotConvergedError       a solver stopped short of the accuracy asked of it
    │   ├── CertificateError        a plan is not what its certificate says
    │   ├── RendezvousError         a rank did not bring its share before the deadline
    │   ├── TooLargeError           the problem is over the service's limits (HTTP 413)
    │   └── BusyError               the service's queue is full (HTTP 429, with Retry-After)
    ├── TrainingError
    │   ├── CheckpointError         a checkpoint is missing, damaged or of another spec
    │   ├── DivergedError           a loss, a weight or a sample is no longer finite
    │   ├── RankError               another rank failed, was lost or did not come in time
    │   └── SupersededError         a later attempt at the job has begun
    └── ServiceError                a process of the platform is absent or answers wrongly
        ├── UnauthenticatedError    a request has no valid token (HTTP 401)
        ├── ForbiddenError          a request may not do that, or comes from a foreign page (HTTP 403)
        ├── JobNotFoundError        no job has that id (HTTP 404)
        ├── ConflictError           the state of a job, or an earlier request, forbids that (HTTP 409)
        ├── ModelNotFoundError      no registered model has that name, alias or version (HTTP 404)
        └── StorageError            a store of objects refuses, fails or does not answer
            └── ObjectNotFoundError     there is no such object or bucket

A message names what was received; ``hint`` says what to do about it. The command line prints both, and a
traceback only with ``--debug``.
"""

from __future__ import annotations


class MongeError(Exception):
    """Root of the tree.

    Args:
        message: what is wrong, with the value received.
        hint: what the reader can do about it.
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
    """A request's body has a type that is not taken."""


class DataError(MongeError):
    """Something is wrong with images or with what describes them."""


class SourceError(DataError):
    """A source of images cannot be found, fetched or trusted."""


class CorruptImageError(DataError):
    """One image cannot be decoded."""


class TooManyBadImagesError(DataError):
    """More images were set aside than ``data.max_bad_fraction`` allows."""


class ShardError(DataError):
    """A shard or its manifest is missing or does not match its hash."""


class TransportError(MongeError):
    """A transport plan could not be had."""


class ProblemError(TransportError):
    """Points, weights, cost or epsilon do not make a transport problem."""


class NotConvergedError(TransportError):
    """A solver stopped short of the accuracy asked of it."""


class CertificateError(TransportError):
    """A plan is not what its certificate says."""


class RendezvousError(TransportError):
    """A rank did not bring its share of a global problem before the deadline."""


class TooLargeError(TransportError):
    """The problem is over the service's limits."""


class BusyError(TransportError):
    """The service's queue is full.

    Args:
        retry_after: seconds after which the queue is expected to have room.
    """

    def __init__(self, message: str, *, hint: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class TrainingError(MongeError):
    """A training run cannot go on."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, damaged or of another spec."""


class DivergedError(TrainingError):
    """A loss, a weight or a sample is no longer finite."""


class RankError(TrainingError):
    """Another rank failed, was lost or did not come in time."""


class SupersededError(TrainingError):
    """A later attempt at the job has begun: this one may write no more."""


class ServiceError(MongeError):
    """A process of the platform is absent or answers wrongly."""


class UnauthenticatedError(ServiceError):
    """A request has no valid token."""


class ForbiddenError(ServiceError):
    """A request may not do that: by the role of its token, or because it comes from a foreign page."""


class JobNotFoundError(ServiceError):
    """No job has that id."""


class ConflictError(ServiceError):
    """The state of a job, or an earlier request with the same key, forbids that."""


class ModelNotFoundError(ServiceError):
    """No registered model has that name, alias or version."""


class StorageError(ServiceError):
    """A store of objects refuses, fails or does not answer."""


class ObjectNotFoundError(StorageError):
    """There is no such object or bucket."""
