"""The store that an address names."""

from __future__ import annotations

from pathlib import Path

from services.settings import Settings
from services.storage.local import FolderStorage
from services.storage.objects import Storage, split_address
from services.storage.s3 import S3Storage


def open_storage(address: str, settings: Settings) -> Storage:
    """The store at an address; nothing is asked of it yet.

    Args:
        address: ``s3://bucket/prefix``, or the path of a folder.
        settings: of S3.

    Raises:
        SpecError: the address is no address.
    """
    if "://" in address:
        return S3Storage(*split_address(address), settings)
    return FolderStorage(Path(address).expanduser().resolve())
