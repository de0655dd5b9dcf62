"""Random access and the stream of batches."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data import loader as loader_module
from pipelines.data import shard
from pipelines.data.loader import Loader, ShardedDataset, Split, open_dataset
from pipelines.data.partition import batch_indices, rank_slice
from pipelines.data.shard import chunks, write_manifest, write_shard
from pipelines.data.shards import MappedShards
from pipelines.data.source import open_source
from pipelines.errors import ShardError
from pipelines.spec import DataSpec


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardedDataset:
    """Create 50 images in shards of 7; all pixels of an image have its number as value."""
    monkeypatch.setattr(shard, "SHARD_IMAGES", 7)
    images = np.arange(50, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(50) % 3)
    spec = DataSpec(source=str(tmp_path / "a.npz"))
    source = open_source(spec, tmp_path / "cache")
    spans = chunks(len(source), source.image)
    write_manifest(
        source, spec, tmp_path / "out", [write_shard(source, tmp_path / "out", i, *s) for i, s in enumerate(spans)]
    )
    return open_dataset(tmp_path / "out")


def loader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("loader")}


def test_take_keeps_the_order_asked_for(dataset: ShardedDataset) -> None:
    split = dataset.train
    numbers = split.take(np.arange(len(split)))[0][:, 0, 0, 0]
    assert (numbers % 3).tolist() == split.labels.tolist()
    rng = np.random.default_rng(0)
    for size in (0, 1, 5, 200):
        asked = rng.integers(0, len(split), size)
        for indices in (asked, torch.from_numpy(asked)):
            images, labels = split.take(indices)
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
            assert images.shape == (size, 1, 4, 4)
            assert images[:, 0, 3, 3].tolist() == numbers[asked].tolist()
            assert labels.tolist() == split.labels[asked].tolist()


def test_the_splits_share_nothing(dataset: ShardedDataset) -> None:
    train, test = (
        set(split.take(np.arange(len(split)))[0][:, 0, 0, 0].tolist())
        for split in (dataset.split("train"), dataset.split("test"))
    )
    assert train | test == set(range(50))
    assert not train & test


def test_taken_images_are_the_callers(dataset: ShardedDataset) -> None:
    images, labels = dataset.train.take(np.arange(4))
    before = images.clone()
    images.zero_()
    labels.zero_()
    assert torch.equal(dataset.train.take(np.arange(4))[0], before)
    assert dataset.train.labels[:4].any()


def test_an_index_outside_the_split_is_refused(dataset: ShardedDataset) -> None:
    with pytest.raises(IndexError):
        dataset.train.take(np.array([len(dataset.train)]))


@pytest.mark.parametrize("block", [None, 1, 5])
@pytest.mark.parametrize(("rank", "world", "start"), [(0, 1, 0), (1, 3, 0), (2, 3, 11), (11, 12, 2)])
def test_the_stream_is_the_partition(
    dataset: ShardedDataset, rank: int, world: int, start: int, block: int | None
) -> None:
    split = dataset.train
    with Loader(split, batch=8, seed=3, rank=rank, world=world, start_step=start, block=block) as loader:
        for step in range(start, start + 40):
            batch = next(loader)
            expected = batch_indices(len(split), 3, 8, step)[rank_slice(8, rank, world)]
            assert batch.step == step
            assert batch.indices.tolist() == expected.tolist()
            images, labels = split.take(expected)
            assert torch.equal(batch.images, images)
            assert torch.equal(batch.labels, labels)


def test_more_ranks_than_images_in_a_batch(dataset: ShardedDataset) -> None:
    with Loader(dataset.train, batch=2, seed=0, rank=0, world=5) as loader:
        assert next(loader).images.shape == (0, 1, 4, 4)


def test_the_thread_ends_with_the_loader(dataset: ShardedDataset) -> None:
    before = loader_threads()
    with Loader(dataset.train, batch=8, seed=0) as loader:
        for _ in range(2):  # of the block of two that it took last, one is left over
            next(loader)
        assert loader_threads() > before
    assert loader_threads() == before
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()  # again: nothing happens


def test_an_error_of_the_thread_is_raised_in_the_consumer(
    dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Split.take

    def failing(self: Split, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if np.array_equal(indices, batch_indices(len(self), 0, 8, 2)):
            raise ShardError("the disk is gone")
        return take(self, indices)

    monkeypatch.setattr(Split, "take", failing)
    before = loader_threads()
    loader = Loader(dataset.train, batch=8, seed=0, block=1)
    steps = [next(loader).step, next(loader).step]
    assert steps == [0, 1]
    with pytest.raises(ShardError, match="the disk is gone"):
        next(loader)
    assert loader_threads() == before
    with pytest.raises(StopIteration):
        next(loader)


def test_exactly_prefetch_is_read_ahead(dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[int] = []
    original = Loader._request

    def counting(self: Loader) -> None:
        requested.append(self._step)
        original(self)

    monkeypatch.setattr(Loader, "_request", counting)
    with Loader(dataset.train, batch=8, seed=0, prefetch=3, block=1) as loader:
        for step in range(5):
            assert requested == list(range(step + 3))
            assert next(loader).step == step


def test_blocks_grow_up_to_their_bytes(dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = Split.take
    monkeypatch.setattr(Split, "take", lambda self, indices: (taken.append(len(indices) // 8), take(self, indices))[1])
    with Loader(dataset.train, batch=8, seed=0, prefetch=1) as loader:
        for _ in range(64):
            next(loader)
    assert taken[:7] == [1, 2, 4, 8, 16, 16, 16]
    taken.clear()
    monkeypatch.setattr(loader_module, "BLOCK_BYTES", 3 * 8 * 16 + 5)
    with Loader(dataset.train, batch=8, seed=0, prefetch=1) as loader:
        for _ in range(20):
            next(loader)
    assert taken[:4] == [1, 2, 3, 3]
    taken.clear()
    monkeypatch.setattr(loader_module, "BLOCK_BYTES", 1)
    with Loader(dataset.train, batch=8, seed=0) as loader:
        next(loader)
    assert set(taken) == {1}


def test_arguments_out_of_range(dataset: ShardedDataset) -> None:
    for wrong in ({"batch": 0}, {"start_step": -1}, {"prefetch": 0}, {"block": 0}, {"rank": 2, "world": 2}):
        with pytest.raises(ValueError, match="expected"):
            Loader(dataset.train, **{"batch": 8, "seed": 0, **wrong})
    empty = Split(
        "test", MappedShards([np.zeros((3, 1, 4, 4), np.uint8)]), np.empty(0, np.int64), np.empty(0, np.int64)
    )
    with pytest.raises(ShardError, match="the test split is empty"):
        Loader(empty, batch=8, seed=0)


def test_the_first_images_of_each_class(dataset: ShardedDataset) -> None:
    assert dataset.limited(None) is dataset
    few = dataset.limited(3)
    assert few.test is dataset.test
    labels = dataset.train.labels
    expected = sorted(np.concatenate([np.flatnonzero(labels == label)[:3] for label in np.unique(labels)]))
    images, classes = few.train.take(np.arange(len(few.train)))
    assert np.array_equal(classes, labels[expected])
    assert torch.equal(images, dataset.train.take(np.array(expected))[0])
    assert len(dataset.limited(10**6).train) == len(dataset.train)
