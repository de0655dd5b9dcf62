"""Opening of storage by address."""

from __future__ import annotations

from pathlib import Path

from services.settings import Settings
from services.storage.local import FolderStorage
from services.storage.objects import Storage, split_address
from services.storage.s3 import S3Storage


def open_storage(address: str, settings: Settings) -> Storage:
    """Return the storage at an address, without sending a request.

    Args:
        address: ``s3://bucket/prefix``, or the path of a folder.
        settings: settings of S3.

    Raises:
        SpecError: the address is invalid.
    """
    if "://" in address:
        return S3Storage(*split_address(address), settings)
    return FolderStorage(Path(address).expanduser().resolve())
