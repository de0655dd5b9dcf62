"""Sources in S3: copied once to the cache, where they are opened as any local source."""

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
"""Objects fetched at a time: small ones wait for the server, not for the network."""

FILE_BYTES = 8 * 2**30
"""Largest .npz, tar or Parquet file that is fetched."""

_PART = 64 * 2**20
"""Bytes of one request; of a larger object what was fetched is kept when the rest fails."""

_MODIFIED = (0, 0)
"""Times of every copy: a copy made anew is the same source, see :func:`pipelines.data.source.fingerprint`."""


def local(spec: DataSpec, cache: Path) -> DataSpec:
    """The spec with a source in S3 replaced by its copy in the cache; any other spec as it is.

    A data set of shards in S3 is left there: jobs fetch what they need of it.

    A copy is named by the keys, sizes and versions that the bucket lists: what changed there is another copy. An
    interrupted one goes on where it stopped, within a large object too. Files that no source reads are not fetched,
    only named.

    Args:
        spec: ``source`` may be ``s3://bucket/prefix``, laid out as a folder may be, or a single .npz, .tar or
            .parquet file.
        cache: folder of downloads.

    Raises:
        SourceError: nothing lies there, or it does not fit a folder.
        StorageError: S3 refuses, fails or does not answer.
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
        raise SourceError(f"{source}: there is no such object", hint="check the name, and MONGE_S3_ENDPOINT_URL")
    root = cache / _identity(source, [found])
    if not _is_whole(root / name):
        _fetch(store, found, root)
    return root / name


def _folder(source: str, cache: Path, settings: Settings) -> Path | None:
    """The copy of a prefix; None for a data set of shards."""
    store = open_storage(source, settings)
    # A key may be any text: none leads out of the cache.
    found = [entry for page in store.pages() for entry in page if check_key(entry.key)]
    listed = [entry for entry in found if not _hidden(entry.key)]
    keys = {entry.key for entry in listed}
    if {MANIFEST, INDEX} <= keys:
        return None
    if any(entry.key.startswith(f"{RECEIPTS}/") for entry in found):
        raise half_done(source)
    if not listed:
        raise SourceError(f"{source}: no objects there", hint="check the prefix, and MONGE_S3_ENDPOINT_URL")
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
            f"{store.address}/{entry.key}: cannot be kept as a file: {error.strerror}",
            hint="an object whose name is also a folder's has no place in one; else see what is free in the cache",
        ) from None


def _wanted(store: Storage, entry: StoredObject) -> int:
    """Bytes of an object that a source reads at most: one over a limit is enough for the source to refuse it."""
    key = entry.key.lower()
    if key.endswith(SUFFIXES):
        return MAX_BYTES + 1
    if key.endswith(TABLE_SUFFIXES):
        return TABLE_BYTES + 1
    if not key.endswith(FILE_SUFFIXES):
        return 0
    if entry.size > FILE_BYTES:
        raise SourceError(
            f"{store.address}/{entry.key}: {entry.size} bytes, over the limit of {FILE_BYTES}",
            hint="cut it into smaller tar or Parquet files in one folder",
        )
    return FILE_BYTES


def _fetch_parts(store: Storage, entry: StoredObject, size: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("ab") as file:
        # Two that fetch at once would write over one another; the lock ends with its holder's process.
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
    """Whether a copy was made to its end, of which its time is the last."""
    return path.is_file() and path.stat().st_mtime_ns == 0


def _hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _identity(source: str, listed: list[StoredObject]) -> str:
    state = hashlib.sha256(source.encode())
    for entry in listed:
        state.update(f"\0{entry.key}\0{entry.size}\0{entry.version}".encode())
    return state.hexdigest()[:32]
