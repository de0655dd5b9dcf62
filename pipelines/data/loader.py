"""Reading of data sets: random access to images, and the stream of a rank's batches."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from pipelines.data.arrays import file_sha256, map_arrays, unpack_arrays
from pipelines.data.cache import ShardCache
from pipelines.data.manifest import INDEX, MANIFEST, Manifest, parse_manifest, read_manifest
from pipelines.data.partition import batch_indices, rank_slice
from pipelines.data.shard import ShardStore
from pipelines.data.shards import CachedShards, MappedShards, Shards
from pipelines.data.split import SIDES, SplitName
from pipelines.errors import ShardError
from pipelines.shape import ImageShape

BLOCK_BATCHES = 16
BLOCK_BYTES = 2**22
"""What is taken at once, of small images many batches: a shard that has an image for each of them is visited once."""

LOOKAHEAD = 8
"""Batches beyond those read ahead whose shards are fetched already, where they lie elsewhere."""


ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        images: images, (b, c, h, w) uint8.
        labels: labels, (b,) int64.
        indices: indices of the images in the split, (b,) int64.
        step: index of the global batch.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    step: int


class Split:
    """The train, test or validation images of a data set.

    Attributes:
        name: ``train``, ``test`` or ``validation``.
        labels: labels of all images, (n,) int64.
    """

    def __init__(self, name: str, shards: Shards, rows: np.ndarray, labels: np.ndarray) -> None:
        self.name = name
        self.labels = labels
        self._shards = shards
        self._rows = rows
        self._starts = np.cumsum([0, *shards.counts])

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read images and labels, in the order of the indices.

        Only NumPy indexing is used: it has no thread pool that would compete with that of torch.

        Args:
            indices: indices of the images, (b,) integers in 0 … len − 1; repeats are allowed.

        Returns:
            Images, (b, c, h, w) uint8, and labels, (b,) int64.

        Raises:
            ShardError: a fetched shard is damaged.
            StorageError: a shard cannot be fetched.
        """
        indices = np.asarray(indices, dtype=np.int64)
        rows = self._rows[indices]
        images = np.empty((len(rows), *self._shards.dims), dtype=np.uint8)
        order = np.argsort(rows)  # the pages of a shard are then touched once, in the order of the file
        shard_of = np.searchsorted(self._starts, rows[order], side="right") - 1
        runs = np.flatnonzero(np.diff(shard_of, prepend=-1))
        self._shards.want(shard_of[runs].tolist())
        for begin, end in zip(runs, np.append(runs, len(order))[1:], strict=True):
            number, places = int(shard_of[begin]), order[begin:end]
            images[places] = self._shards[number][rows[places] - self._starts[number]]
        return torch.from_numpy(images), torch.from_numpy(self.labels[indices])

    @property
    def pixels(self) -> int:
        """Size of one image, in bytes."""
        return int(np.prod(self._shards.dims))

    @property
    def reads_ahead(self) -> bool:
        """Whether the shards are remote, so that :meth:`want` is useful."""
        return self._shards.reads_ahead

    def want(self, indices: np.ndarray) -> None:
        """Fetch the shards of images that are needed soon, in the background.

        Args:
            indices: indices of the images, (b,) integers in 0 … len − 1.
        """
        self._shards.want(np.unique(np.searchsorted(self._starts, self._rows[indices], side="right") - 1).tolist())

    def first_of_each_class(self, count: int) -> Split:
        """Split of the first ``count`` images of each class, or of all if a class has fewer, in the same order."""
        kept = [np.flatnonzero(self.labels == label)[:count] for label in np.unique(self.labels)]
        chosen = np.sort(np.concatenate(kept))
        return Split(self.name, self._shards, self._rows[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class ShardedDataset:
    """An opened data set of shards.

    Attributes:
        address: folder of the data set, or address in a store.
        manifest: manifest of the data set.
        train: training split.
        test: test split.
        validation: validation split; None if ``data.validation_fraction`` is 0.
    """

    address: str
    manifest: Manifest
    train: Split
    test: Split
    validation: Split | None = None

    @property
    def image(self) -> ImageShape:
        """Shape of the images."""
        return self.manifest.image

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.manifest.classes

    def split(self, name: SplitName) -> Split:
        """One of the splits.

        Raises:
            ShardError: there is no validation split.
        """
        found = {"train": self.train, "test": self.test, "validation": self.validation}[name]
        if found is None:
            raise ShardError("the data set has no validation split", hint="set data.validation_fraction")
        return found

    def limited(self, per_class: int | None) -> ShardedDataset:
        """Data set with only the first ``per_class`` training images of each class; None keeps all."""
        return self if per_class is None else replace(self, train=self.train.first_of_each_class(per_class))


def open_dataset(folder: str | Path, verify: slice = ALL) -> ShardedDataset:
    """Open a data set on this machine; its shards are mapped into memory.

    Args:
        folder: folder of its manifest.
        verify: slice of the shards whose hashes are verified, which reads them once; the index is always verified. Each
            of w ranks may verify its own part, ``slice(rank, None, w)``.

    Raises:
        ShardError: a file is missing, damaged or of another shape.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    index = _open_file(folder / INDEX, manifest.index_sha256)
    verified = range(len(manifest.shards))[verify]
    shards = []
    for number, entry in enumerate(manifest.shards):
        sha256 = entry.sha256 if number in verified else None
        images = _open_file(folder / entry.file, sha256).get("images", np.empty(0))
        _expect(folder / entry.file, images, np.uint8, (entry.count, *manifest.image.dims))
        shards.append(images)
    return _dataset(str(folder), manifest, index, MappedShards(shards))


def open_stored(store: ShardStore, address: str, cache: ShardCache) -> ShardedDataset:
    """Open a remote data set; its shards are fetched and verified when their images are needed.

    Args:
        store: store of the data set.
        address: address of the store, for errors.
        cache: cache of fetched shards.

    Raises:
        ShardError: the manifest or the index is damaged.
        StorageError: the store rejects a request, fails or does not respond.
    """
    manifest = parse_manifest(store.read(MANIFEST), f"{address}/{MANIFEST}")
    data = store.read(INDEX)
    try:
        if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
            raise ValueError(f"its sha256 is not the manifest's {manifest.index_sha256}")
        index = unpack_arrays(data)
    except ValueError as error:
        raise ShardError(f"{address}/{INDEX}: {error}", hint="shard the data set anew") from None
    return _dataset(address, manifest, index, CachedShards(store, address, manifest.shards, manifest.image, cache))


def _dataset(place: str, manifest: Manifest, index: dict[str, np.ndarray], shards: Shards) -> ShardedDataset:
    split, labels = index.get("split", np.empty(0)), index.get("labels", np.empty(0))
    _expect(f"{place}/{INDEX}", split, np.uint8, (manifest.images,))
    _expect(f"{place}/{INDEX}", labels, np.int64, (manifest.images,))
    train, test, validation = (
        Split(name, shards, rows, labels[rows])
        for name, rows in ((name, np.flatnonzero(split == side)) for name, side in SIDES.items())
    )
    return ShardedDataset(place, manifest, train, test, validation if len(validation) else None)


def _open_file(path: Path, sha256: str | None) -> dict[str, np.ndarray]:
    hint = f"remove {path.parent} and submit again: the data set is then sharded anew"
    try:
        if sha256 is not None and file_sha256(path) != sha256:
            raise ShardError(f"{path}: its sha256 is not the manifest's {sha256}", hint=hint)
        return map_arrays(path)
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read: {error}", hint=hint) from None


def _expect(path: Path | str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ShardError(
            f"{path}: holds an array {array.shape} {array.dtype}, expected {shape} {np.dtype(dtype)}",
            hint="remove its folder and submit again: the data set is then sharded anew",
        )


class Loader(Iterator[Batch]):
    """Infinite stream of one rank's batches, prefetched by a background thread.

    For remote data sets, the shards of later batches are fetched at the same time.

    The images are a pure function of ``(len(split), seed, batch, step, rank, world)``, see
    :mod:`pipelines.data.partition`. Use the loader as a context manager to stop the thread.

    Args:
        split: split of the images.
        batch: size of the global batch.
        seed: seed of the job.
        rank: index of this rank.
        world: number of ranks.
        start_step: index of the first step.
        prefetch: number of blocks of batches to prefetch, ≥ 1.
        block: largest number of batches in a block, ≥ 1; by default :data:`BLOCK_BATCHES`, limited to
            :data:`BLOCK_BYTES` of pixels. The first block has one batch, for a fast start, and each following block is
            twice as large.

    Raises:
        ShardError: the split is empty.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        split: Split,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        prefetch: int = 2,
        block: int | None = None,
    ) -> None:
        if not len(split):
            raise ShardError(f"the {split.name} split is empty", hint="add images, or change data.test_fraction")
        if batch < 1 or start_step < 0 or prefetch < 1 or (block is not None and block < 1):
            raise ValueError(
                "batch ≥ 1, start_step ≥ 0, prefetch ≥ 1, block ≥ 1 expected: "
                f"{batch}, {start_step}, {prefetch}, {block}"
            )
        self._split = split
        self._batch = batch
        self._seed = seed
        self._share = rank_slice(batch, rank, world)
        self._step = start_step
        self._wanted = start_step  # the first step whose shards were not asked for
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        if block is None:
            pixels = max(1, len(range(batch)[self._share])) * split.pixels
            block = min(BLOCK_BATCHES, max(1, BLOCK_BYTES // pixels))
        self._most = block
        self._block = 1
        self._ready: deque[Batch] = deque()
        self._ahead: deque[Future[list[Batch]]] = deque()
        for _ in range(prefetch):
            self._request()

    def __next__(self) -> Batch:
        """Return the next batch; an error of the background thread is raised here and ends the stream."""
        if not self._ready:
            if not self._ahead:
                raise StopIteration
            try:
                self._ready.extend(self._ahead.popleft().result())
            except BaseException:
                self.close()
                raise
            self._request()
        return self._ready.popleft()

    def close(self) -> None:
        """Stop the thread and drop prefetched batches; a closed loader yields no more batches."""
        self._ready.clear()
        self._ahead.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self) -> None:
        self._ahead.append(self._thread.submit(self._read, self._step, self._block))
        self._step += self._block
        self._block = min(2 * self._block, self._most)

    def _read(self, first: int, count: int) -> list[Batch]:
        parts = [self._indices(step) for step in range(first, first + count)]
        if self._split.reads_ahead:
            for later in range(max(first + count, self._wanted), first + count + LOOKAHEAD):
                self._split.want(self._indices(later))
            self._wanted = first + count + LOOKAHEAD
        images, labels = self._split.take(np.concatenate(parts))
        sizes = [len(part) for part in parts]
        cut = zip(images.split(sizes), labels.split(sizes), parts, strict=True)
        return [Batch(x, y, torch.from_numpy(part), first + k) for k, (x, y, part) in enumerate(cut)]

    def _indices(self, step: int) -> np.ndarray:
        return batch_indices(len(self._split), self._seed, self._batch, step)[self._share]
