"""Checkpoints of a job, and the origin of a job that continues another one.

Must import neither torch nor Ray: the job service and the driver import this module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pipelines.errors import CheckpointError, SpecError
from services.settings import Settings
from services.storage.objects import SCHEME
from services.storage.open import open_storage

NAME = re.compile(r"images-(\d{12,})(?:-(\d+))?")
"""Name of a checkpoint folder: images seen, and a number if several have as many."""

FILES = ("state.json", "state.safetensors")
"""Files of a checkpoint; an interrupted upload lacks some."""

_ORIGIN = re.compile(r"([A-Za-z0-9][\w.-]*)(?:@(\d{1,18}))?", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """The starting point of a job that continues another one.

    Attributes:
        job: id of the job to continue.
        images: number of images that the checkpoint has seen; None for the latest.
    """

    job: str
    images: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``JOB`` or ``JOB@IMAGES``.

        Raises:
            SpecError: the text is neither.
        """
        if (found := _ORIGIN.fullmatch(text)) is None:
            raise SpecError(f"origin: {text[:200]!r} is neither JOB nor JOB@IMAGES", hint="see `monge jobs`")
        return cls(found[1], None if found[2] is None else int(found[2]))

    def __str__(self) -> str:
        return self.job if self.images is None else f"{self.job}@{self.images}"

    def at(self, images: int) -> Origin:
        """Return the origin with this number of images."""
        return replace(self, images=images)


def age(name: str) -> tuple[int, int]:
    """Return the sort key of a checkpoint: its images, and its number among those with as many."""
    found = NAME.fullmatch(name)
    return (int(found[1]), int(found[2] or 1)) if found else (-1, 0)


def complete_checkpoints(jobs: str, job: str, settings: Settings) -> list[str]:
    """Return the names of the complete checkpoints of a job, oldest first.

    Args:
        jobs: address of all jobs: a folder, or an S3 address.
        job: id of the job.
        settings: settings of S3.

    Raises:
        StorageError: S3 rejects the request, fails or is unreachable.
    """
    return sorted(filter(NAME.fullmatch, _folders(f"{jobs}/{job}", settings)), key=age)


def _folders(address: str, settings: Settings) -> set[str]:
    if not address.startswith(SCHEME):
        folder = Path(address)
        found = folder.iterdir() if folder.is_dir() else ()
        return {one.name for one in found if all((one / name).is_file() for name in FILES)}
    keys = {found.key for page in open_storage(address, settings).pages("images-") for found in page}
    names = {key.partition("/")[0] for key in keys}
    return {name for name in names if all(f"{name}/{file}" in keys for file in FILES)}


def find_origin(jobs: str, origin: Origin, settings: Settings) -> tuple[Origin, str]:
    """Return the checkpoint of an origin, and its name.

    Args:
        jobs: address of all jobs: a folder, or an S3 address.
        origin: job and, optionally, number of images.
        settings: settings of S3.

    Returns:
        The origin with its number of images, and the name of the checkpoint.

    Raises:
        CheckpointError: the job has no checkpoint, or none with this number of images.
        StorageError: S3 rejects the request, fails or is unreachable.
    """
    names = complete_checkpoints(jobs, origin.job, settings)
    if not names:
        raise CheckpointError(
            f"origin: {origin.job} has no checkpoint in {jobs}", hint="use a job that has saved a checkpoint"
        )
    fitting = [name for name in names if origin.images in (None, age(name)[0])]
    if not fitting:
        counts = ", ".join(str(count) for count in sorted({age(name)[0] for name in names}))
        raise CheckpointError(
            f"origin: {origin} does not exist; {origin.job} has checkpoints at {counts} images",
            hint=f"use one of them, such as {origin.at(age(names[-1])[0])}",
        )
    return origin.at(age(fitting[-1])[0]), fitting[-1]
