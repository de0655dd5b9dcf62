"""Processes of one machine that must not get in each other's way: locks, and files that one of them writes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import ServiceError


@contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file; the lock goes with its process, however that ends.

    Raises:
        ServiceError: another process holds it; the message is ``otherwise``.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(otherwise, hint="wait for it, or end it, then start again") from None
        yield


def write_once(path: Path, text: str, mode: int) -> None:
    """Write a new file.

    Args:
        path: of the file.
        text: that it holds.
        mode: who may read and write it, from the beginning on.

    Raises:
        FileExistsError: there is one, whoever wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
