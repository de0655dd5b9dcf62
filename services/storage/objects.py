"""Interface of object storage, for folders and buckets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipelines.errors import SpecError, StorageError

SCHEME = "s3://"
"""Prefix of an S3 address."""

PAGE = 1000
"""Maximum number of objects per page, as in S3."""

READ_LIMIT = 2**30
"""Default maximum number of bytes of a read."""


@dataclass(frozen=True)
class StoredObject:
    """An object in a listing.

    Attributes:
        key: name relative to the root of the store.
        size: size in bytes.
        version: value that changes with the content: the ETag in S3, the modification time in a folder.
    """

    key: str
    size: int
    version: str


class Storage(Protocol):
    """Objects below a root. Keys are relative paths with ``/``.

    All methods raise StorageError if the store rejects the request, fails or is unreachable.
    """

    @property
    def address(self) -> str:
        """Address of the root: a path, or ``s3://bucket/prefix``."""

    def pages(self, prefix: str = "") -> Iterator[list[StoredObject]]:
        """Yield pages of the objects whose keys start with a prefix, in the order of the keys' UTF-8 bytes."""

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """Return the content of an object.

        Raises:
            ObjectNotFoundError: the object does not exist.
            StorageError: the object has more than ``limit`` bytes.
        """

    def read_range(self, key: str, start: int, stop: int, version: str | None = None) -> bytes:
        """Return bytes ``start … stop − 1`` of an object; fewer if it ends before.

        Args:
            key: key of the object.
            start, stop: range of bytes.
            version: version from a listing; another version is not read.

        Raises:
            ObjectNotFoundError: the object does not exist.
            StorageError: the object has another version.
        """

    def write(self, key: str, data: bytes) -> None:
        """Write an object atomically: readers see the old or the new content."""

    def delete(self, key: str) -> None:
        """Delete an object; no error if it does not exist."""

    def exists(self, key: str) -> bool:
        """Return whether an object exists."""

    def size(self, key: str) -> int:
        """Return the size of an object in bytes.

        Raises:
            ObjectNotFoundError: the object does not exist.
        """


def check_key(key: str) -> str:
    """Return the key if it is valid and below the root.

    Raises:
        StorageError: the key is empty or absolute, or a part of it is empty, ``.`` or ``..``.
    """
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"an object's key is relative and has no empty, '.' or '..' part: received {key!r}")
    return key


def check_range(start: int, stop: int) -> None:
    """Raise if a range is empty, reversed or too large.

    Raises:
        StorageError: not 0 ≤ start < stop ≤ start + READ_LIMIT.
    """
    if not 0 <= start < stop <= start + READ_LIMIT:
        raise StorageError(f"a range has 0 ≤ start < stop ≤ start + {READ_LIMIT}: received {start} … {stop}")


def changed_error(name: str) -> StorageError:
    """Return the error for an object that has changed since it was listed."""
    return StorageError(f"{name}: changed since it was listed", hint="run again when no other process writes there")


def too_large(name: str, limit: int) -> StorageError:
    """Return the error for an object over the size limit of a read."""
    return StorageError(f"{name}: more than {limit} bytes", hint="read it in ranges")


def split_address(address: str) -> tuple[str, str]:
    """Return bucket and prefix of ``s3://bucket/prefix``; the prefix has no slash at its ends.

    Raises:
        SpecError: the address has no bucket, or contains keys.
    """
    bucket, _, prefix = address.removeprefix(SCHEME).partition("/")
    if "@" in bucket:
        # The part before @ is a secret and must not appear in the message.
        raise SpecError(
            "an address s3://bucket/prefix must not contain keys", hint="pass keys in the environment or in a profile"
        )
    if not address.startswith(SCHEME) or not bucket or ":" in bucket:
        raise SpecError(f"expected an S3 address s3://bucket/prefix, received {address!r}")
    return bucket, prefix.strip("/")
