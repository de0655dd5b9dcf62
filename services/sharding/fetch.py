"""Sources in S3: copied once to the cache, where they are opened as any local source."""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.data.arrays import write_atomically
from pipelines.data.decode import MAX_BYTES
from pipelines.data.source import SUFFIXES
from pipelines.errors import SourceError
from pipelines.spec import DataSpec
from services.settings import Settings, load_settings
from services.storage.objects import Storage, StoredObject, check_key
from services.storage.open import open_storage

log = logging.getLogger(__name__)

SCHEME = "s3://"
AT_ONCE = 16
"""Objects fetched at a time: small ones wait for the server, not for the network."""

ARRAYS_BYTES = 8 * 2**30
"""Largest .npz file that is fetched."""

_PART = 64 * 2**20
_MODIFIED = (0, 0)
"""Times of every copy: a copy made anew is the same source, see :func:`pipelines.data.source.fingerprint`."""


def local(spec: DataSpec, cache: Path) -> DataSpec:
    """The spec with a source in S3 replaced by its copy in the cache; any other spec as it is.

    A copy is named by the keys, sizes and versions that the bucket lists: what changed there is another copy. An
    interrupted one goes on where it stopped. Files that are not taken for images are not fetched, only named.

    Args:
        spec: ``source`` may be ``s3://bucket/prefix``, a folder of class folders, or ``s3://bucket/name.npz``.
        cache: folder of downloads.

    Raises:
        SourceError: nothing lies there, or it does not fit a folder.
        StorageError: S3 refuses, fails or does not answer.
    """
    if not spec.source.startswith(SCHEME):
        return spec
    settings = load_settings()
    copy = _arrays if spec.source.endswith(".npz") else _folder
    return spec.model_copy(update={"source": str(copy(spec.source, cache.resolve() / "s3", settings))})


def _arrays(source: str, cache: Path, settings: Settings) -> Path:
    parent, _, name = source.rpartition("/")
    store = open_storage(parent, settings)
    found = next((entry for page in store.pages(name) for entry in page if entry.key == name), None)
    if found is None:
        raise SourceError(f"{source}: there is no such object", cure="check the name, and MONGE_S3_ENDPOINT_URL")
    if found.size > ARRAYS_BYTES:
        raise SourceError(f"{source}: {found.size} bytes, over the limit of {ARRAYS_BYTES}", cure="give a folder")
    path = cache / _identity(source, [found]) / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{name}.{os.getpid()}.part")
        with part.open("wb") as file:
            for start in range(0, found.size, _PART):
                file.write(store.read_range(name, start, min(start + _PART, found.size)))
        os.utime(part, _MODIFIED)
        part.replace(path)
    return path


def _folder(source: str, cache: Path, settings: Settings) -> Path:
    store = open_storage(source, settings)
    # A key may be any text: none leads out of the cache.
    listed = [entry for page in store.pages() for entry in page if not _hidden(check_key(entry.key))]
    if not listed:
        raise SourceError(f"{source}: no objects there", cure="check the prefix, and MONGE_S3_ENDPOINT_URL")
    root = cache / _identity(source, listed)
    missing = [entry for entry in listed if not (root / entry.key).is_file()]
    if missing:
        log.info("%s: fetching %d of %d objects", source, len(missing), len(listed))
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for _ in pool.map(lambda entry: _fetch(store, entry, root), missing):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return root


def _fetch(store: Storage, entry: StoredObject, root: Path) -> None:
    data = b""
    if entry.size and entry.key.lower().endswith(SUFFIXES):
        # One byte over the limit is enough for the decoder to set the image aside.
        data = store.read_range(entry.key, 0, min(entry.size, MAX_BYTES + 1))
    path = root / entry.key
    try:
        write_atomically(path, data)
        os.utime(path, _MODIFIED)
    except OSError as error:
        raise SourceError(
            f"{store.address}/{entry.key}: cannot be kept as a file: {error.strerror}",
            cure="an object whose name is also a folder's has no place in one; else see what is free in the cache",
        ) from None


def _hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _identity(source: str, listed: list[StoredObject]) -> str:
    state = hashlib.sha256(source.encode())
    for entry in listed:
        state.update(f"\0{entry.key}\0{entry.size}\0{entry.version}".encode())
    return state.hexdigest()[:32]
