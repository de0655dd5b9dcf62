"""What is checked of a job that continues another one, before it is accepted."""

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
"""Looks up a job by its id; raises :class:`JobNotFoundError` where there is none."""


def require_origin(asked: str, spec: JobSpec, find: Find, settings: Settings) -> Origin:
    """The checkpoint that a job would start with, if it may.

    Args:
        asked: ``JOB`` or ``JOB@IMAGES``.
        spec: of the job that continues it.
        find: looks up jobs.
        settings: where checkpoints lie; where those of the origin are not seen, they are left to the driver.

    Raises:
        SpecError: naming the field; the origin is no job, is not over, has no such checkpoint, or is of another kind;
            or it has seen all images that the job would see.
    """
    origin = Origin.parse(asked)
    try:
        found = find(origin.job)
    except JobNotFoundError as error:
        raise SpecError(f"origin: {error.args[0]}", hint=error.hint) from None
    if not found.state.final:
        raise SpecError(
            f"origin: job {origin.job} is {found.state}",
            hint=f"wait for its end, or end it with `monge cancel {origin.job}`",
        )
    _require_kinds(spec, found.spec, origin)
    jobs = jobs_address(settings)
    if settings.storage or (Path(jobs) / origin.job).is_dir() or not found.attempts:
        try:
            origin, _ = find_origin(jobs, origin, hurried(settings))
        except CheckpointError as error:
            raise SpecError(error.args[0], hint=error.hint) from None
        except StorageError:
            pass  # the job service may have no keys; the driver has
    if origin.images is not None:
        spec.require_more(origin.images)
    return origin


def _require_kinds(spec: JobSpec, other: dict[str, Any], origin: Origin) -> None:
    for section in ("model", "objective", "optimizer"):
        kind, its = getattr(spec, section).kind, other[section]["kind"]
        if kind != its:
            raise SpecError(
                f"{section}.kind: {kind!r}, while {origin.job} has {its!r}",
                hint=f"continue it with {section}.kind {its}; its rates and images may change",
            )
