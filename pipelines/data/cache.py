"""Cache of fetched files by hash, of limited size, shared by the processes of a machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.data.arrays import file_sha256, map_arrays
from pipelines.errors import ShardError, StorageError

SUFFIX = ".safetensors"
LOCK = ".lock"


@dataclass(frozen=True)
class ShardCache:
    """Least-recently-used cache of shards on local disk.

    Files are named by their sha256, so data sets and jobs share equal shards, and are written atomically. A process
    verifies the hash of a file when it opens it. A file that is evicted while it is mapped stays readable for the
    processes that map it.

    Attributes:
        folder: folder of the cache, created on demand.
        limit: largest size of the cache, in bytes; the file fetched last is kept for any size.
    """

    folder: Path
    limit: int

    def get(self, sha256: str, name: str, fetch: Callable[[], bytes]) -> dict[str, np.ndarray]:
        """Map the arrays of a shard; if it is missing, only one of several processes fetches it.

        Args:
            sha256: sha256 of the file.
            name: name of the file, for errors.
            fetch: function that reads the file from its store.

        Raises:
            ShardError: the fetched file has another hash, or is not a shard.
            StorageError: ``fetch`` failed, or the folder cannot be written.
        """
        path = self._path(sha256)
        if (found := _intact(path, sha256)) is not None:
            return found
        try:
            with self._alone(sha256) as part:
                if (found := _intact(path, sha256)) is not None:  # another process was faster
                    return found
                data = fetch()
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise ShardError(
                        f"{name}: its sha256 is not the manifest's {sha256}",
                        hint="give the `monge shard` that made it again: it writes damaged shards anew",
                    )
                part.write_bytes(data)
                arrays = map_arrays(part)
                part.replace(path)
                self._evict(path)
                return arrays
        except ValueError as error:
            raise ShardError(f"{name}: {error}", hint="shard the data set anew") from None
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot keep {name}: {error.strerror}",
                hint="see what is free there, set MONGE_SHARD_CACHE to another folder or lower MONGE_SHARD_CACHE_GIB",
            ) from None

    def touch(self, sha256: str) -> bool:
        """Mark a file as recently used; return False if it was evicted."""
        try:
            os.utime(self._path(sha256))
        except OSError:
            return False
        return True

    def holds(self, sha256: str) -> bool:
        """Whether a file is in the cache."""
        return self._path(sha256).exists()

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}{SUFFIX}"

    @contextmanager
    def _alone(self, sha256: str) -> Iterator[Path]:
        """Open a file for writing by one process and thread at a time; the lock is released when the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{sha256}.part"
        descriptor = _locked(part)
        try:
            yield part
        finally:
            if _is(part, descriptor):  # not that of another process, begun after this one became the shard
                part.unlink()
            os.close(descriptor)

    def _evict(self, kept: Path) -> None:
        with (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held = []
            for path in self.folder.glob(f"*{SUFFIX}"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    held.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in held)
            for _, size, path in sorted(held):
                if total <= self.limit:
                    return
                if path != kept:
                    path.unlink(missing_ok=True)
                    total -= size


def _locked(part: Path) -> int:
    """A locked descriptor of a file that still has its name."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is(part, descriptor):
            return descriptor
        os.close(descriptor)  # whoever held it before has made it into the shard, or removed it


def _is(path: Path, descriptor: int) -> bool:
    """Whether a path refers to the file of a descriptor."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _intact(path: Path, sha256: str) -> dict[str, np.ndarray] | None:
    """Map the arrays of a file if it exists and matches its hash."""
    try:
        if file_sha256(path) != sha256:  # a disk that failed, or a machine that lost its power as it wrote
            return None
        return map_arrays(path)
    except (OSError, ValueError):
        return None
