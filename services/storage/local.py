"""Storage of objects as files in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipelines.data.arrays import write_atomically
from pipelines.errors import ObjectNotFoundError, StorageError
from services.storage.objects import PAGE, READ_LIMIT, StoredObject, changed_error, check_key, check_range, too_large


@dataclass(frozen=True)
class FolderStorage:
    """Files in a folder; hidden files and folders are not listed.

    Attributes:
        root: path of the folder; the first write creates it.
    """

    root: Path

    @property
    def address(self) -> str:
        return str(self.root)

    def pages(self, prefix: str = "") -> Iterator[list[StoredObject]]:
        found = self._below(self.root, "", prefix)
        while page := list(islice(found, PAGE)):
            yield page

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        data = self._read(key, 0, limit + 1)
        if len(data) > limit:
            raise too_large(str(self.root / key), limit)
        return data

    def read_range(self, key: str, start: int, stop: int, version: str | None = None) -> bytes:
        check_range(start, stop)
        data = self._read(key, start, stop - start)
        if version is not None and str((self.root / key).stat().st_mtime_ns) != version:
            raise changed_error(str(self.root / key))
        return data

    def write(self, key: str, data: bytes) -> None:
        path = self.root / check_key(key)
        try:
            write_atomically(path, data)
        except OSError as error:
            raise _told(path, error) from None

    def delete(self, key: str) -> None:
        path = self.root / check_key(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _told(path, error) from None

    def exists(self, key: str) -> bool:
        return (self.root / check_key(key)).is_file()

    def size(self, key: str) -> int:
        path = self.root / check_key(key)
        if not path.is_file():
            raise ObjectNotFoundError(f"{path}: there is no such file")
        return path.stat().st_size

    def _read(self, key: str, start: int, count: int) -> bytes:
        path = self.root / check_key(key)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(count)
        except OSError as error:
            raise _told(path, error) from None

    def _below(self, folder: Path, above: str, prefix: str) -> Iterator[StoredObject]:
        try:
            with os.scandir(folder) as entries:
                # Folders sort by their name with a slash, to match the order of whole keys.
                named = sorted(
                    (os.fsencode(entry.name + "/" * entry.is_dir()), entry)
                    for entry in entries
                    if not entry.name.startswith(".")
                )
        except OSError as error:
            raise _told(folder, error) from None
        for _, entry in named:
            key = above + entry.name
            if entry.is_dir():
                inside = key + "/"
                if inside.startswith(prefix) or prefix.startswith(inside):
                    yield from self._below(folder / entry.name, inside, prefix)
            elif key.startswith(prefix) and entry.is_file():
                status = entry.stat()
                yield StoredObject(key, status.st_size, str(status.st_mtime_ns))


def _told(path: Path, error: OSError) -> StorageError:
    if isinstance(error, FileNotFoundError):
        return ObjectNotFoundError(f"{path}: there is no such file or folder")
    return StorageError(f"{path}: {error.strerror}", hint="check permissions and free space")
