"""Shards into batches: random access to a data set, and the stream of a rank's batches."""

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
        images: (b, c, h, w) uint8.
        labels: (b,) int64.
        indices: (b,) int64, the images' places in the split.
        step: which global batch.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    step: int


class Split:
    """The train, test or validation images of a data set.

    Attributes:
        name: ``train``, ``test`` or ``validation``.
        labels: (n,) int64.
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
        """Images and labels, in the order asked for.

        Nothing but NumPy's indexing is at work here: it has no thread pool that would compete with torch's.

        Args:
            indices: (b,) integers in 0 … len − 1, repeats allowed.

        Returns:
            (b, c, h, w) uint8 and (b,) int64.

        Raises:
            ShardError: a shard that had to be fetched is damaged.
            StorageError: it cannot be fetched.
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
        """Values of one image, of a byte each."""
        return int(np.prod(self._shards.dims))

    @property
    def reads_ahead(self) -> bool:
        """Whether :meth:`want` is of use: the shards lie elsewhere."""
        return self._shards.reads_ahead

    def want(self, indices: np.ndarray) -> None:
        """Images that will be taken soon: their shards are fetched in the background.

        Args:
            indices: (b,) integers in 0 … len − 1.
        """
        self._shards.want(np.unique(np.searchsorted(self._starts, self._rows[indices], side="right") - 1).tolist())

    def first_of_each_class(self, count: int) -> Split:
        """The first ``count`` images of each class, in the order of this split; all of a class that has fewer."""
        kept = [np.flatnonzero(self.labels == label)[:count] for label in np.unique(self.labels)]
        chosen = np.sort(np.concatenate(kept))
        return Split(self.name, self._shards, self._rows[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class ShardedDataset:
    """A data set of shards, opened.

    Attributes:
        address: where it lies: a folder, or that of a store.
        manifest: what it says of itself.
        train: its training images.
        test: its held-out images.
        validation: held-out images for choosing, None where ``data.validation_fraction`` sets none apart.
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
        """With the first ``per_class`` training images of each class alone; None keeps all."""
        return self if per_class is None else replace(self, train=self.train.first_of_each_class(per_class))


def open_dataset(folder: str | Path, verify: slice = ALL) -> ShardedDataset:
    """Open a data set on this machine: its shards are mapped into memory.

    Args:
        folder: where its manifest lies.
        verify: which shards are compared with their hashes, which reads them once; the index always is. Each of w ranks
            may verify its own part, ``slice(rank, None, w)``.

    Raises:
        ShardError: naming the file that is missing, damaged or of another shape.
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
    """Open a data set that lies elsewhere: its shards are fetched when images of theirs are needed, and verified.

    Args:
        store: where it lies.
        address: of the store, for errors.
        cache: where fetched shards are kept.

    Raises:
        ShardError: its manifest or its index is damaged.
        StorageError: the store refuses, fails or does not answer.
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
    """The endless stream of one rank's batches, read ahead by a thread of its own.

    Of a data set that lies elsewhere, the shards of the batches after those are fetched meanwhile.

    Which images it yields is a pure function of ``(len(split), seed, batch, step, rank, world)``, see
    :mod:`pipelines.data.partition`. Use it as a context manager, so that the thread ends with it.

    Args:
        split: the images.
        batch: global batch.
        seed: of the job.
        rank: this rank.
        world: number of ranks.
        start_step: number of global batches seen before.
        prefetch: blocks of batches read ahead, ≥ 1.
        block: batches in a block at most, ≥ 1; by default :data:`BLOCK_BATCHES`, and :data:`BLOCK_BYTES` of pixels. The
            first is of one batch, so that it comes soon, and each after it twice as large.

    Raises:
        ShardError: the split is empty.
        ValueError: an argument is out of its range.
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
        """The next batch; an error of the reading thread is raised here, and ends the stream."""
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
        """End the thread. Batches read ahead are dropped; a closed loader yields nothing more."""
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
