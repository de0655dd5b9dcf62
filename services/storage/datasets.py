"""Data sets of shards, opened where they lie."""

from __future__ import annotations

from pipelines.data.cache import ShardCache
from pipelines.data.loader import ALL, ShardedDataset, open_dataset, open_stored
from services.settings import Settings
from services.storage.open import open_storage


def open_data(address: str, settings: Settings, verify: slice = ALL) -> ShardedDataset:
    """Open a data set: one in a folder is mapped, of one in S3 the shards are fetched when they are needed.

    Args:
        address: a folder, or ``s3://bucket/prefix``.
        settings: of S3, and of the cache in which fetched shards are kept.
        verify: which shards of a folder are compared with their hashes; what is fetched always is.

    Raises:
        ShardError: naming the file that is damaged.
        StorageError: S3 refuses, fails or does not answer.
    """
    if "://" not in address:
        return open_dataset(address, verify)
    store = open_storage(address, settings)
    return open_stored(store, store.address, ShardCache(settings.shards, int(settings.shard_cache_gib * 2**30)))
