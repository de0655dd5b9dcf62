"""Locks and files that several processes of one machine share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import ServiceError


@contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file; the lock is released when its process ends.

    Raises:
        ServiceError: another process holds the lock; the message is ``otherwise``.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(otherwise, hint="wait until it ends, or stop it, then retry") from None
        yield


def write_once(path: Path, text: str, mode: int) -> None:
    """Write a new file.

    Args:
        path: path of the file.
        text: content of the file.
        mode: permissions, set at creation.

    Raises:
        FileExistsError: the file exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
