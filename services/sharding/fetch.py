"""Sources in S3: copied to the cache once, and then opened like local sources."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.data.arrays import write_atomically
from pipelines.data.decode import MAX_BYTES
from pipelines.data.manifest import INDEX, MANIFEST
from pipelines.data.shard import RECEIPTS
from pipelines.data.source import FILE_SUFFIXES
from pipelines.data.sources.base import SUFFIXES
from pipelines.data.sources.table import TABLE_BYTES, TABLE_SUFFIXES
from pipelines.errors import SourceError
from pipelines.spec import DataSpec
from services.settings import Settings, load_settings
from services.sharding.destination import half_done
from services.storage.objects import SCHEME, Storage, StoredObject, check_key
from services.storage.open import open_storage

log = logging.getLogger(__name__)

AT_ONCE = 16
"""Number of objects fetched concurrently: for small ones, latency dominates."""

FILE_BYTES = 8 * 2**30
"""Maximum size of an .npz, tar or Parquet file to fetch, in bytes."""

_PART = 64 * 2**20
"""Size of a request in bytes; the fetched parts of a larger object are kept if a later part fails."""

_MODIFIED = (0, 0)
"""Times of all copies: a repeated copy has the same fingerprint, see :func:`pipelines.data.source.fingerprint`."""


def local(spec: DataSpec, cache: Path) -> DataSpec:
    """Return the spec with a source in S3 replaced by its copy in the cache; other specs are returned unchanged.

    A sharded data set in S3 is not copied: jobs fetch the shards they need.

    The name of a copy depends on the keys, sizes and versions in the bucket: a changed source gets another copy. An
    interrupted copy continues where it stopped, also within a large object. For files that no source reads, only the
    name is recorded.

    Args:
        spec: ``source`` may be ``s3://bucket/prefix`` with the layout of a folder, or a single .npz, .tar or
            .parquet file.
        cache: folder for downloads.

    Raises:
        SourceError: the prefix is empty, or its keys do not form a folder.
        StorageError: S3 rejects the request, fails or is unreachable.
    """
    if not spec.source.startswith(SCHEME):
        return spec
    settings = load_settings()
    copy = _file if spec.source.lower().endswith(FILE_SUFFIXES) else _folder
    copied = copy(spec.source, cache.resolve() / "s3", settings)
    return spec if copied is None else spec.model_copy(update={"source": str(copied)})


def _file(source: str, cache: Path, settings: Settings) -> Path:
    parent, _, name = source.rpartition("/")
    store = open_storage(parent, settings)
    found = next((entry for page in store.pages(name) for entry in page if entry.key == name), None)
    if found is None:
        raise SourceError(f"{source}: object not found", hint="check the name and MONGE_S3_ENDPOINT_URL")
    root = cache / _identity(source, [found])
    if not _is_whole(root / name):
        _fetch(store, found, root)
    return root / name


def _folder(source: str, cache: Path, settings: Settings) -> Path | None:
    """Return the copy of a prefix; None for a sharded data set."""
    store = open_storage(source, settings)
    # A key may be any text; it must not point outside the cache.
    found = [entry for page in store.pages() for entry in page if check_key(entry.key)]
    listed = [entry for entry in found if not _hidden(entry.key)]
    keys = {entry.key for entry in listed}
    if {MANIFEST, INDEX} <= keys:
        return None
    if any(entry.key.startswith(f"{RECEIPTS}/") for entry in found):
        raise half_done(source)
    if not listed:
        raise SourceError(f"{source}: no objects found", hint="check the prefix and MONGE_S3_ENDPOINT_URL")
    root = cache / _identity(source, listed)
    missing = [entry for entry in listed if not _is_whole(root / entry.key)]
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
    path = root / entry.key
    size = min(entry.size, _wanted(store, entry))
    try:
        if size <= _PART:
            data = store.read_range(entry.key, 0, size, entry.version) if size else b""
            write_atomically(path, data)
            os.utime(path, _MODIFIED)
        else:
            _fetch_parts(store, entry, size, path)
    except OSError as error:
        raise SourceError(
            f"{store.address}/{entry.key}: cannot be stored as a file: {error.strerror}",
            hint="check that no object has the name of a folder, and the free space of the cache",
        ) from None


def _wanted(store: Storage, entry: StoredObject) -> int:
    """Return the maximum number of bytes to read of an object: one over the limit, so that the source rejects it."""
    key = entry.key.lower()
    if key.endswith(SUFFIXES):
        return MAX_BYTES + 1
    if key.endswith(TABLE_SUFFIXES):
        return TABLE_BYTES + 1
    if not key.endswith(FILE_SUFFIXES):
        return 0
    if entry.size > FILE_BYTES:
        raise SourceError(
            f"{store.address}/{entry.key}: {entry.size} bytes exceeds the limit of {FILE_BYTES}",
            hint="split it into smaller tar or Parquet files in one folder",
        )
    return FILE_BYTES


def _fetch_parts(store: Storage, entry: StoredObject, size: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("ab") as file:
        # Concurrent fetches would overwrite each other; the lock ends with its process.
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_whole(path):
            return
        done = file.seek(0, os.SEEK_END) // _PART * _PART
        file.truncate(done)
        for start in range(done, size, _PART):
            file.write(store.read_range(entry.key, start, min(start + _PART, size), entry.version))
            file.flush()
        os.utime(part, _MODIFIED)
        os.replace(part, path)


def _is_whole(path: Path) -> bool:
    """Return whether a copy is complete; its time is set last."""
    return path.is_file() and path.stat().st_mtime_ns == 0


def _hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _identity(source: str, listed: list[StoredObject]) -> str:
    state = hashlib.sha256(source.encode())
    for entry in listed:
        state.update(f"\0{entry.key}\0{entry.size}\0{entry.version}".encode())
    return state.hexdigest()[:32]
