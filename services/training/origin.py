"""The job whose checkpoint another one goes on from, and the checkpoints of a job as they lie below the home folder.

Nothing here imports torch or Ray: the job service and the driver look here as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pipelines.errors import CheckpointError, SpecError

NAME = re.compile(r"images-(\d{12,})(?:-(\d+))?")
"""Of the folder of a checkpoint: the images seen, and its number among those of as many."""

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
            raise SpecError(f"origin: {text[:200]!r} is neither JOB nor JOB@IMAGES", cure="see `monge jobs`")
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


def kept(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a job, oldest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found = (one for one in folder.iterdir() if NAME.fullmatch(one.name) and one.is_dir())
    return sorted(found, key=lambda one: age(one.name))


def find_origin(jobs: Path, origin: Origin) -> tuple[Origin, Path]:
    """The checkpoint of an origin, and its folder.

    Args:
        jobs: the folder of all jobs.
        origin: the job, and which of its checkpoints.

    Returns:
        The origin with its images, and the folder of the checkpoint.

    Raises:
        CheckpointError: the job keeps no checkpoint, or none of so many images.
    """
    folders = kept(jobs / origin.job)
    if not folders:
        raise CheckpointError(
            f"origin: no checkpoint of {origin.job} lies in {jobs}", cure="continue a job that has saved one"
        )
    fitting = [one for one in folders if origin.images in (None, age(one.name)[0])]
    if not fitting:
        counts = ", ".join(str(count) for count in sorted({age(one.name)[0] for one in folders}))
        raise CheckpointError(
            f"origin: {origin} is not kept; the checkpoints of {origin.job} are those of {counts} images",
            cure=f"choose one of them, as in {origin.at(age(folders[-1].name)[0])}",
        )
    return origin.at(age(fitting[-1].name)[0]), fitting[-1]
