"""Opening of sharded data sets in a folder or in S3."""

from __future__ import annotations

from pipelines.data.cache import ShardCache
from pipelines.data.loader import ALL, ShardedDataset, open_dataset, open_stored
from services.settings import Settings
from services.storage.open import open_storage


def open_data(address: str, settings: Settings, verify: slice = ALL) -> ShardedDataset:
    """Open a data set: shards in a folder are memory-mapped, shards in S3 are fetched when needed.

    Args:
        address: folder, or ``s3://bucket/prefix``.
        settings: settings of S3 and of the shard cache.
        verify: shards of a folder to compare with their hashes; fetched shards are always compared.

    Raises:
        ShardError: a file is damaged; the message names it.
        StorageError: S3 rejects the request, fails or is unreachable.
    """
    if "://" not in address:
        return open_dataset(address, verify)
    store = open_storage(address, settings)
    return open_stored(store, store.address, ShardCache(settings.shards, int(settings.shard_cache_gib * 2**30)))
