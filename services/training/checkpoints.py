"""Checkpoints of a run: which one to resume from, and the names of new ones."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import ray.train
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType
from ray.train import Checkpoint

from pipelines.distributed import from_first_rank, rank
from pipelines.errors import CheckpointError
from pipelines.training.checkpoint import verify_checkpoint
from services.settings import Settings
from services.storage.arrow import open_files, s3_errors
from services.training.config import jobs_address
from services.training.origin import NAME, Origin, age, complete_checkpoints, find_origin
from services.training.progress import report_stage
from services.training.snapshot import counted


@dataclass(frozen=True)
class Resumption:
    """The starting point of a run.

    Attributes:
        folder: folder of the checkpoint; None at the first start of a job.
        origin: checkpoint of another job for the first start, or None.
        taken: names of checkpoints that the run must not use. Ray Train knows them already: when it deletes the first
            of two checkpoints of one name, it deletes the folder of both. Only rank 0 knows the names: Ray Train uses
            the name from rank 0.
    """

    folder: Path | None = None
    origin: Path | None = None
    taken: frozenset[str] = frozenset()

    def name(self, images: int) -> str:
        """Return the name of the folder for a checkpoint after ``images`` images."""
        plain = f"images-{images:012d}"
        name, attempt = plain, 1
        while name in self.taken:
            attempt += 1
            name = f"{plain}-{attempt}"
        return name


@contextmanager
def resumption(
    settings: Settings | None = None, origin: Origin | None = None, job: str | None = None
) -> Iterator[Resumption]:
    """Yield the latest undamaged checkpoint of this job, the same on all ranks; every rank must call it.

    Rank 0 verifies the checkpoints, reports damaged ones, and broadcasts the choice.

    Args:
        settings: settings with the storage of checkpoints.
        origin: checkpoint of another job to use if this one has none; no other one replaces it.
        job: id of this job, to find checkpoints that Ray Train does not know.

    Raises:
        CheckpointError: all checkpoints are damaged, or that of the origin is missing or damaged.
        StorageError: S3 rejects the request, fails or is unreachable.
    """
    with ExitStack() as stack:
        with nullcontext() if settings is None else s3_errors(settings, "read"):
            found = _found(settings, origin, job, stack)
        yield found


def _found(settings: Settings | None, origin: Origin | None, job: str | None, stack: ExitStack) -> Resumption:
    latest = ray.train.get_checkpoint()
    if latest is None and settings is not None and job is not None:
        latest = _unlisted(settings, job)
    if latest is None:
        return Resumption(origin=None if settings is None or origin is None else _of_origin(settings, origin, stack))
    if rank() == 0:
        name, folder = _whole(latest, stack)
        taken = counted(latest.filesystem, posixpath.dirname(latest.path))
        from_first_rank(name)
    else:
        name, taken = from_first_rank(""), frozenset()
        folder = stack.enter_context(_sibling(latest, name).as_directory())
    return Resumption(Path(folder), taken=taken)


def _unlisted(settings: Settings, job: str) -> Checkpoint | None:
    """Return the latest checkpoint in the folder of a job whose list of checkpoints is missing.

    A single damaged checkpoint is the first one, whose upload was interrupted: returns None then.
    """
    name = ""
    if rank() == 0 and (found := complete_checkpoints(jobs_address(settings), job, settings)):
        # If there are several, earlier ones are checked with it.
        name = found[-1] if len(found) > 1 or _is_whole(_stored(settings, job, found[0])) else ""
    name = from_first_rank(name)
    return _stored(settings, job, name) if name else None


def _is_whole(checkpoint: Checkpoint) -> bool:
    try:
        with checkpoint.as_directory() as folder:
            verify_checkpoint(Path(folder))
    except (CheckpointError, FileNotFoundError):
        return False
    return True


def _stored(settings: Settings, job: str, name: str) -> Checkpoint:
    filesystem, path = open_files(f"{jobs_address(settings)}/{job}/{name}", settings)
    return Checkpoint(path, filesystem)


def _of_origin(settings: Settings, origin: Origin, stack: ExitStack) -> Path:
    """Return the folder of the checkpoint, which exists until the stack is closed."""
    jobs = jobs_address(settings)
    name = find_origin(jobs, origin, settings)[1] if rank() == 0 else from_first_rank("")
    folder = Path(stack.enter_context(_stored(settings, origin.job, name).as_directory()))
    if rank() == 0:
        verify_checkpoint(folder)
        from_first_rank(name)
    return folder


def _whole(latest: Checkpoint, stack: ExitStack) -> tuple[str, str]:
    """Return the name of the latest undamaged checkpoint, and its folder, which exists until the stack is closed."""
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
            report_stage(f"checkpoint {other} is damaged; training resumes from {name} instead: {reason.args[0]}")
        return name, folder
    raise damaged[newest]


def _names(latest: Checkpoint) -> list[str]:
    """Return the names of all checkpoint folders next to the latest, and its own."""
    filesystem: FileSystem = latest.filesystem
    found: list[FileInfo] = filesystem.get_file_info(FileSelector(posixpath.dirname(latest.path), allow_not_found=True))
    return [one.base_name for one in found if one.type == FileType.Directory and NAME.fullmatch(one.base_name)]


def _sibling(latest: Checkpoint, name: str) -> Checkpoint:
    # Not the folder that Ray Train passed: ranks on one machine fetch into the same folder, and rank 0 might read
    # while others write.
    return Checkpoint(_path(latest, name), latest.filesystem)


def _path(latest: Checkpoint, name: str) -> str:
    return posixpath.join(posixpath.dirname(latest.path), name)
