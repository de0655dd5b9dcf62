"""The job whose checkpoint another one goes on from, and the checkpoints of a job, in the home folder or in S3.

Nothing here imports torch or Ray: the job service and the driver look here as well.
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
"""Of the folder of a checkpoint: the images seen, and its number among those of as many."""

FILES = ("state.json", "state.safetensors")
"""Of a checkpoint; an upload that was cut short has not all of them."""

_ORIGIN = re.compile(r"([A-Za-z0-9][\w.-]*)(?:@(\d{1,18}))?", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """Where a job starts, in place of fresh weights.

    Attributes:
        job: id of the job that it continues.
        images: that the checkpoint has seen; None for the latest.
    """

    job: str
    images: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``JOB`` or ``JOB@IMAGES``.

        Raises:
            SpecError: it is neither.
        """
        if (found := _ORIGIN.fullmatch(text)) is None:
            raise SpecError(f"origin: {text[:200]!r} is neither JOB nor JOB@IMAGES", hint="see `monge jobs`")
        return cls(found[1], None if found[2] is None else int(found[2]))

    def __str__(self) -> str:
        return self.job if self.images is None else f"{self.job}@{self.images}"

    def at(self, images: int) -> Origin:
        """This job's checkpoint of so many images."""
        return replace(self, images=images)


def age(name: str) -> tuple[int, int]:
    """The images of a checkpoint, and its number among those of as many; checkpoints are sorted by both."""
    found = NAME.fullmatch(name)
    return (int(found[1]), int(found[2] or 1)) if found else (-1, 0)


def complete_checkpoints(jobs: str, job: str, settings: Settings) -> list[str]:
    """The names of the checkpoints of a job that have all their files, oldest first.

    Args:
        jobs: address of all jobs: a folder, or one in S3.
        job: its id.
        settings: of S3.

    Raises:
        StorageError: S3 refuses, fails or does not answer.
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
    """The checkpoint of an origin, and its name.

    Args:
        jobs: address of all jobs: a folder, or one in S3.
        origin: the job, and which of its checkpoints.
        settings: of S3.

    Returns:
        The origin with its images, and the name of the checkpoint.

    Raises:
        CheckpointError: the job keeps no checkpoint, or none of so many images.
        StorageError: S3 refuses, fails or does not answer.
    """
    names = complete_checkpoints(jobs, origin.job, settings)
    if not names:
        raise CheckpointError(
            f"origin: no checkpoint of {origin.job} lies in {jobs}", hint="continue a job that has saved one"
        )
    fitting = [name for name in names if origin.images in (None, age(name)[0])]
    if not fitting:
        counts = ", ".join(str(count) for count in sorted({age(name)[0] for name in names}))
        raise CheckpointError(
            f"origin: {origin} is not kept; the checkpoints of {origin.job} are those of {counts} images",
            hint=f"choose one of them, as in {origin.at(age(names[-1])[0])}",
        )
    return origin.at(age(fitting[-1])[0]), fitting[-1]
