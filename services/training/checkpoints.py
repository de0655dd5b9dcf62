"""Which of the checkpoints that Ray Train keeps a run goes on from, and what it calls those that it adds."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray.train
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType
from ray.train import Checkpoint

from pipelines.distributed import from_first_rank, rank
from pipelines.errors import CheckpointError
from pipelines.training.checkpoint import verify_checkpoint
from services.settings import Settings
from services.storage.arrow import open_files
from services.training.config import jobs_address
from services.training.origin import NAME, Origin, age, find_origin
from services.training.progress import report_stage

_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train writes which checkpoints it keeps."""


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on.

    Attributes:
        folder: the checkpoint, None at the first start of a job.
        origin: the checkpoint of another job that the first start begins with, if it does.
        taken: names of checkpoints that the run may not use for its own. Rank 0 alone knows them: Ray Train takes the
            name of a checkpoint from it.
    """

    folder: Path | None = None
    origin: Path | None = None
    taken: frozenset[str] = frozenset()

    def name(self, images: int) -> str:
        """Of the folder for a checkpoint after so many images."""
        plain = f"images-{images:012d}"
        name, attempt = plain, 1
        while name in self.taken:
            attempt += 1
            name = f"{plain}-{attempt}"
        return name


@contextmanager
def resumption(settings: Settings | None = None, origin: Origin | None = None) -> Iterator[Resumption]:
    """The latest whole checkpoint of this job, the same on all ranks; every rank calls it.

    Rank 0 verifies the checkpoints, reports those that are damaged, and tells the others which one to take.

    Args:
        settings: where checkpoints lie.
        origin: which checkpoint of another job is taken where this one has none; no other one stands in for it.

    Raises:
        CheckpointError: none is whole, and the error is that of the latest; or the origin's is missing or damaged.
        StorageError: S3 refuses, fails or does not answer.
    """
    latest = ray.train.get_checkpoint()
    with ExitStack() as stack:
        if latest is None:
            of_other = None if settings is None or origin is None else _of_origin(settings, origin, stack)
            yield Resumption(origin=of_other)
            return
        if rank() == 0:
            name, folder = _whole(latest, stack)
            taken = _counted(latest)
            from_first_rank(name)
        else:
            name, taken = from_first_rank(""), frozenset()
            folder = stack.enter_context(_sibling(latest, name).as_directory())
        yield Resumption(Path(folder), taken=taken)


def _of_origin(settings: Settings, origin: Origin, stack: ExitStack) -> Path:
    """The folder where the checkpoint lies until the stack is closed."""
    jobs = jobs_address(settings)
    name = find_origin(jobs, origin, settings)[1] if rank() == 0 else from_first_rank("")
    filesystem, path = open_files(f"{jobs}/{origin.job}/{name}", settings)
    folder = Path(stack.enter_context(Checkpoint(path, filesystem).as_directory()))
    if rank() == 0:
        verify_checkpoint(folder)
        from_first_rank(name)
    return folder


def _whole(latest: Checkpoint, stack: ExitStack) -> tuple[str, str]:
    """The name of the latest whole checkpoint, and the folder where it lies until the stack is closed."""
    newest = posixpath.basename(latest.path)
    older = [name for name in _names(latest) if age(name) < age(newest)]
    damaged: dict[str, CheckpointError] = {}
    for name in (newest, *sorted(older, key=age, reverse=True)):
        with ExitStack() as held:
            try:
                folder = held.enter_context(_sibling(latest, name).as_directory())
                verify_checkpoint(Path(folder))
            except CheckpointError as error:
                damaged[name] = error
                continue
            except FileNotFoundError as error:  # nothing to download
                damaged[name] = CheckpointError(f"{name}: its folder is missing: {error}")
                continue
            stack.push(held.pop_all())
        for other, reason in damaged.items():
            report_stage(f"checkpoint {other} is damaged, training goes on from {name} instead: {reason.args[0]}")
        return name, folder
    raise damaged[newest]


def _counted(latest: Checkpoint) -> frozenset[str]:
    """The names of the checkpoints that Ray Train has counted.

    One more under such a name would be counted twice: once the first of both is over the number to keep, Ray Train
    deletes its folder, and with it the new checkpoint. What Ray Train has not counted is an upload that was cut short,
    and is overwritten.
    """
    filesystem: FileSystem = latest.filesystem
    try:
        with filesystem.open_input_stream(_path(latest, _SNAPSHOT)) as stream:
            text = stream.read().decode()
    except FileNotFoundError:
        return frozenset()
    # Its format is not public; the names stand there in quotes.
    return frozenset(name for name in re.findall(r'"([^"]*)"', text) if NAME.fullmatch(name))


def _names(latest: Checkpoint) -> list[str]:
    """The names of all folders of checkpoints beside the latest, and its own."""
    filesystem: FileSystem = latest.filesystem
    found: list[FileInfo] = filesystem.get_file_info(FileSelector(posixpath.dirname(latest.path), allow_not_found=True))
    return [one.base_name for one in found if one.type == FileType.Directory and NAME.fullmatch(one.base_name)]


def _sibling(latest: Checkpoint, name: str) -> Checkpoint:
    # Not the one that Ray Train has handed over: ranks of one machine fetch that to the same folder, and rank 0 would
    # read there while others write.
    return Checkpoint(_path(latest, name), latest.filesystem)


def _path(latest: Checkpoint, name: str) -> str:
    return posixpath.join(posixpath.dirname(latest.path), name)
