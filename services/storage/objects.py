"""Objects by name, wherever they lie: what is asked of a folder and of a bucket alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipelines.errors import SpecError, StorageError

SCHEME = "s3://"
"""Of an address in S3."""

PAGE = 1000
"""Objects of one page at most: what S3 gives with one request."""

READ_LIMIT = 2**30
"""Bytes that a read takes into memory at most, unless it is told otherwise."""


@dataclass(frozen=True)
class StoredObject:
    """An object of a listing.

    Attributes:
        key: its name below the root of the store.
        size: bytes.
        version: changes when its content does: the ETag in S3, the modification time in a folder.
    """

    key: str
    size: int
    version: str


class Storage(Protocol):
    """Objects below one root. Keys are relative, with ``/`` between their parts.

    All methods raise StorageError when the store refuses, fails or does not answer.
    """

    @property
    def address(self) -> str:
        """The root: a path, or ``s3://bucket/prefix``."""

    def pages(self, prefix: str = "") -> Iterator[list[StoredObject]]:
        """The objects whose keys begin with a prefix, in the order of the keys' UTF-8 bytes, a page at a time."""

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """The whole of an object.

        Raises:
            ObjectNotFoundError: there is none.
            StorageError: it has more than ``limit`` bytes.
        """

    def read_range(self, key: str, start: int, stop: int, version: str | None = None) -> bytes:
        """Bytes ``start … stop − 1`` of an object; fewer where it ends before.

        Args:
            key: of the object.
            start, stop: the range.
            version: of a listing; another one is not read.

        Raises:
            ObjectNotFoundError: there is none.
            StorageError: it has another version by now.
        """

    def write(self, key: str, data: bytes) -> None:
        """Write an object in one piece: readers see the old one or the new one, never a part."""

    def delete(self, key: str) -> None:
        """Delete an object; it is no error when there is none."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    def size(self, key: str) -> int:
        """Bytes of an object.

        Raises:
            ObjectNotFoundError: there is none.
        """


def check_key(key: str) -> str:
    """The key, if it stays below the root.

    Raises:
        StorageError: it is empty or absolute, or one of its parts is empty, ``.`` or ``..``.
    """
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"an object's key is relative and has no empty, '.' or '..' part: received {key!r}")
    return key


def check_range(start: int, stop: int) -> None:
    """Refuse a range that is empty, reversed or larger than a read may be.

    Raises:
        StorageError: not 0 ≤ start < stop ≤ start + READ_LIMIT.
    """
    if not 0 <= start < stop <= start + READ_LIMIT:
        raise StorageError(f"a range has 0 ≤ start < stop ≤ start + {READ_LIMIT}: received {start} … {stop}")


def changed_error(name: str) -> StorageError:
    """The error of an object that is no longer the one that was listed."""
    return StorageError(f"{name}: it has changed since it was listed", hint="run again when nobody writes there")


def too_large(name: str, limit: int) -> StorageError:
    """The error of an object over the limit of a read."""
    return StorageError(f"{name}: more than {limit} bytes", hint="read it by ranges")


def split_address(address: str) -> tuple[str, str]:
    """Bucket and prefix of ``s3://bucket/prefix``; the prefix has no slash at its ends.

    Raises:
        SpecError: there is no bucket in it, or more than a bucket.
    """
    bucket, _, prefix = address.removeprefix(SCHEME).partition("/")
    if "@" in bucket:
        # The part before the @ is a secret and stays out of the message.
        raise SpecError(
            "an address s3://bucket/prefix holds no keys", hint="give them in the environment or in a profile"
        )
    if not address.startswith(SCHEME) or not bucket or ":" in bucket:
        raise SpecError(f"an address in S3 is s3://bucket/prefix: received {address!r}")
    return bucket, prefix.strip("/")
