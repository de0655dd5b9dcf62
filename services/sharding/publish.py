"""A data set of shards, made to stay: in a folder of its own or in S3, for jobs to name as their source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pipelines.data.manifest import INDEX, MANIFEST, QUARANTINE, Manifest
from pipelines.data.shard import RECEIPTS
from pipelines.errors import ShardError
from pipelines.spec import DataSpec
from services.settings import Settings
from services.sharding.dataset import LOCK, Progress, dataset_folder, shard_dataset
from services.sharding.fetch import SCHEME
from services.storage.objects import Storage
from services.storage.open import open_storage


def shard_to(
    spec: DataSpec,
    destination: str,
    settings: Settings,
    workers: int | None = None,
    shard_bytes: int | None = None,
    on_images: Progress | None = None,
    on_files: Progress | None = None,
) -> Manifest:
    """Shard a source into a destination; what an earlier, interrupted call finished is kept.

    Args:
        spec: the source and its preparation.
        destination: a folder, or ``s3://bucket/prefix``, whose shards are written to a folder of the home first.
        settings: the home, and S3.
        workers, shard_bytes: see :func:`services.sharding.dataset.shard_dataset`.
        on_images: called with the images sharded and the images in all.
        on_files: called with the files that lie in S3 and the files in all.

    Raises:
        ShardError: the destination holds something else.
        MongeError: of the source, or of S3.
    """
    cache = settings.home / "cache"
    if not destination.startswith(SCHEME):
        folder = Path(destination).expanduser()
        _require_own(folder)
        return shard_dataset(spec, folder, cache, workers, on_images, shard_bytes)
    store = open_storage(destination, settings)
    folder = dataset_folder(settings.home, spec)
    if shard_bytes is not None:
        folder = folder.with_name(f"{folder.name}-{shard_bytes}")
    manifest = shard_dataset(spec, folder, cache, workers, on_images, shard_bytes)
    _upload(manifest, folder, store, on_files or (lambda done, total: None))
    return manifest


def _require_own(folder: Path) -> None:
    """Refuse a folder with anything in it but a data set of shards, finished or not."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ShardError(f"{folder}: is a file", cure="name a folder, which may be new")
    found = {path.name for path in folder.iterdir()}
    if found - {LOCK} and not found & {MANIFEST, RECEIPTS}:
        raise ShardError(
            f"{folder}: holds other files, as {min(found - {LOCK})}", cure="name a new folder, or an empty one"
        )


def _upload(manifest: Manifest, folder: Path, store: Storage, report: Callable[[int, int], None]) -> None:
    """Bring the files that are not there yet, the manifest last.

    Raises:
        ShardError: something else lies there.
    """
    files = [*(shard.file for shard in manifest.shards), INDEX, QUARANTINE, MANIFEST]
    there = {entry.key: entry for page in store.pages() for entry in page}
    if MANIFEST in there and store.read(MANIFEST, limit=2**26) != (folder / MANIFEST).read_bytes():
        raise ShardError(f"{store.address}: holds another data set", cure="name a prefix with nothing below it")
    if others := there.keys() - files:
        raise ShardError(
            f"{store.address}: holds other objects, as {min(others)}", cure="name a prefix with nothing below it"
        )
    for number, name in enumerate(files):
        report(number, len(files))
        data = (folder / name).read_bytes()
        # The ETag of an object that was written in one piece is its MD5, unless the server encrypts it.
        if name not in there or there[name].version.strip('"') != hashlib.md5(data, usedforsecurity=False).hexdigest():
            store.write(name, data)
    report(len(files), len(files))
