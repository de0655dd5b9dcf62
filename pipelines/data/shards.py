"""Images of shards by index: mapped from local files, or fetched from a store into a cache on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from pipelines.data.cache import ShardCache
from pipelines.data.manifest import ShardEntry
from pipelines.data.shard import ShardStore
from pipelines.errors import ShardError
from pipelines.shape import ImageShape

AT_ONCE = 16
"""Shards fetched at a time by one process at most: the wait is for the server, not for the network."""

FETCH_BYTES = 2**28
"""Of the shards that are fetched at a time, which are in memory until they are verified."""

SIGN_OF_LIFE = 10.0
"""Seconds between two marks that a shard is in use, for other processes that share the cache."""


@runtime_checkable
class Shards(Protocol):
    """Images of shards, (k, c, h, w) uint8, by index of the shard."""

    @property
    def counts(self) -> Sequence[int]:
        """Number of images of each shard."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of an image."""

    @property
    def reads_ahead(self) -> bool:
        """Whether announcing the shards that are needed soon is useful."""

    def __getitem__(self, number: int) -> np.ndarray:
        """The images of a shard."""

    def want(self, numbers: Iterable[int]) -> None:
        """Announce shards that are needed soon: missing ones are fetched in the background, in this order."""


class MappedShards:
    """Shards on this machine, mapped into memory.

    Args:
        images: images of each shard.
    """

    reads_ahead = False

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._images = images
        self.counts = [len(part) for part in images]
        self.dims = images[0].shape[1:] if images else ()

    def __getitem__(self, number: int) -> np.ndarray:
        return self._images[number]

    def want(self, numbers: Iterable[int]) -> None:
        """Nothing has to be fetched."""


class CachedShards:
    """Shards of a store, fetched into a cache on first use. Thread-safe.

    If a shard cannot be fetched, an error is raised when its images are requested, and the next request tries again.

    Args:
        store: store of the shards.
        address: address of the store, for errors.
        entries: entries of the shards in the manifest.
        image: shape of the images.
        cache: cache of fetched shards.
    """

    reads_ahead = True

    def __init__(
        self, store: ShardStore, address: str, entries: Sequence[ShardEntry], image: ImageShape, cache: ShardCache
    ) -> None:
        self.counts = [entry.count for entry in entries]
        self.dims = image.dims
        self._store = store
        self._address = address
        self._entries = entries
        self._cache = cache
        self._lock = threading.Lock()
        self._held: dict[int, np.ndarray] = {}
        self._seen: dict[int, float] = {}
        self._fetching: dict[int, Future[np.ndarray]] = {}
        largest = max(self.counts) * image.pixels
        at_once = max(1, min(AT_ONCE, FETCH_BYTES // largest))
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="shards")

    def __getitem__(self, number: int) -> np.ndarray:
        """The images of a shard.

        Raises:
            ShardError: what was fetched is not what the manifest names.
            StorageError: the store refuses, fails or does not answer; or the cache cannot be written.
        """
        with self._lock:
            found = self._known(number)
            fetching = None if found is not None else self._request(number)
        return found if fetching is None else fetching.result()  # type: ignore[return-value]

    def want(self, numbers: Iterable[int]) -> None:
        """Start to fetch missing shards."""
        with self._lock:
            for number in numbers:
                if self._known(number) is None:
                    self._request(number)

    def _known(self, number: int) -> np.ndarray | None:
        """A mapped shard, marked as in use now and then; None where it was evicted meanwhile."""
        found = self._held.get(number)
        if found is not None and time.monotonic() - self._seen[number] > SIGN_OF_LIFE:
            if not self._cache.touch(self._entries[number].sha256):
                del self._held[number]
                return None
            self._seen[number] = time.monotonic()
        return found

    def _request(self, number: int) -> Future[np.ndarray]:
        if number not in self._fetching:
            self._fetching[number] = self._threads.submit(self._fetch, number)
        return self._fetching[number]

    def _fetch(self, number: int) -> np.ndarray:
        entry = self._entries[number]
        name = f"{self._address}/{entry.file}"
        try:
            images = self._cache.get(entry.sha256, name, lambda: self._store.read(entry.file)).get("images")
            if images is None or images.dtype != np.uint8 or images.shape != (entry.count, *self.dims):
                raise ShardError(
                    f"{name}: does not hold {entry.count} images of {self.dims}",
                    hint="shard the data set anew: its manifest does not belong to it",
                )
        except BaseException:
            with self._lock:
                del self._fetching[number]
            raise
        with self._lock:
            self._held[number] = images
            self._seen[number] = time.monotonic()
            del self._fetching[number]
            for other in [n for n in self._held if not self._cache.holds(self._entries[n].sha256)]:
                # While it is mapped, an evicted file takes its room on the disk.
                del self._held[other]
        return images
