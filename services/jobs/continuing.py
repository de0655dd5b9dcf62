"""Checks of a job that continues another one, before it is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.errors import CheckpointError, JobNotFoundError, SpecError, StorageError
from pipelines.spec import JobSpec
from services.jobs.documents import JobDetails
from services.settings import Settings
from services.storage.s3 import hurried
from services.training.config import jobs_address
from services.training.origin import Origin, find_origin

Find = Callable[[str], JobDetails]
"""Return a job by its id; raises :class:`JobNotFoundError` if it does not exist."""


def require_origin(asked: str, spec: JobSpec, find: Find, settings: Settings) -> Origin:
    """Return the checkpoint that a job would start from.

    Args:
        asked: origin of the submission, ``JOB`` or ``JOB@IMAGES``.
        spec: spec of the new job.
        find: function that looks up a job.
        settings: settings with the storage of checkpoints; if it is not visible here, the driver checks them.

    Raises:
        SpecError: names the field: the origin does not exist, has not ended, has no such checkpoint, is of another
            kind, or has already seen all images of the new job.
    """
    origin = Origin.parse(asked)
    try:
        found = find(origin.job)
    except JobNotFoundError as error:
        raise SpecError(f"origin: {error.args[0]}", hint=error.hint) from None
    if not found.state.final:
        raise SpecError(
            f"origin: job {origin.job} is {found.state}",
            hint=f"wait until it ends, or cancel it with `monge cancel {origin.job}`",
        )
    _require_kinds(spec, found.spec, origin)
    jobs = jobs_address(settings)
    if settings.storage or (Path(jobs) / origin.job).is_dir() or not found.attempts:
        try:
            origin, _ = find_origin(jobs, origin, hurried(settings))
        except CheckpointError as error:
            raise SpecError(error.args[0], hint=error.hint) from None
        except StorageError:
            pass  # the job service may lack S3 keys that the driver has
    if origin.images is not None:
        spec.require_more(origin.images)
    return origin


def _require_kinds(spec: JobSpec, other: dict[str, Any], origin: Origin) -> None:
    for section in ("model", "objective", "optimizer"):
        kind, its = getattr(spec, section).kind, other[section]["kind"]
        if kind != its:
            raise SpecError(
                f"{section}.kind: {kind!r}, but {origin.job} has {its!r}",
                hint=f"use {section}.kind {its}; only rates and images may change",
            )
