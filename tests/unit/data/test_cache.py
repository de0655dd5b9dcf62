"""Shards that are downloaded on demand, and their cache folder."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import shard, shards
from pipelines.data.arrays import pack_arrays
from pipelines.data.cache import ShardCache
from pipelines.data.loader import Loader, ShardedDataset, open_dataset, open_stored
from pipelines.data.shard import Folder, chunks, write_manifest, write_shard
from pipelines.data.source import open_source
from pipelines.errors import ShardError, StorageError
from pipelines.spec import DataSpec


class Counted(Folder):
    """A folder that records reads, and can block a reader."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        object.__setattr__(self, "reads", [])
        object.__setattr__(self, "failing", set())
        object.__setattr__(self, "gate", None)

    reads: list[str]
    failing: set[str]
    gate: threading.Barrier | None

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        if self.gate and key.startswith("shard"):
            self.gate.wait(30)
        if key in self.failing:
            raise StorageError(f"store/{key}: the server failed")
        return super().read(key)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create 50 images in 8 shards of 7; all pixels of an image have its number as value."""
    monkeypatch.setattr(shard, "SHARD_IMAGES", 7)
    images = np.arange(50, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(50) % 3)
    spec = DataSpec(source=str(tmp_path / "a.npz"))
    source = open_source(spec, tmp_path / "cache")
    spans = chunks(len(source), source.image)
    write_manifest(
        source, spec, tmp_path / "out", [write_shard(source, tmp_path / "out", i, *s) for i, s in enumerate(spans)]
    )
    return tmp_path / "out"


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "shards", 2**20)


def opened(store: Counted, cache: ShardCache) -> ShardedDataset:
    return open_stored(store, "store", cache)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def kept(cache: ShardCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


@pytest.mark.parametrize("limit", [2**20, 1])
def test_the_stream_is_that_of_the_folder(folder: Path, tmp_path: Path, limit: int) -> None:
    stored = opened(Counted(folder), ShardCache(tmp_path / "shards", limit))
    mapped = open_dataset(folder)
    assert stored.address == "store"
    for rank, world, start in ((0, 1, 0), (1, 3, 4), (2, 3, 11)):
        with (
            Loader(stored.train, 8, 3, rank, world, start) as lazily,
            Loader(mapped.train, 8, 3, rank, world, start) as at_once,
        ):
            for _ in range(12):
                ours, theirs = next(lazily), next(at_once)
                assert ours.images.tolist() == theirs.images.tolist()
                assert ours.labels.tolist() == theirs.labels.tolist()
                assert ours.indices.tolist() == theirs.indices.tolist()
    data_files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(data_files) == (1 if limit == 1 else 8)  # what was fetched last stays


def test_only_what_is_needed_is_fetched_and_once(folder: Path, cache: ShardCache) -> None:
    store = Counted(folder)
    data = opened(store, cache)
    assert store.reads == ["manifest.json", "index.safetensors"]
    data.train.take(np.array([0]))
    assert store.reads[2:] == ["shard-00000.safetensors"]
    for split in (data.train, data.test):
        split.take(np.arange(len(split)))
    assert sorted(store.reads[2:]) == [f"shard-{i:05d}.safetensors" for i in range(8)]
    again = Counted(folder)
    data = opened(again, cache)
    data.train.take(np.arange(len(data.train)))
    assert again.reads == ["manifest.json", "index.safetensors"]


def test_the_next_batches_are_fetched_meanwhile(folder: Path, cache: ShardCache) -> None:
    store = Counted(folder)
    data = opened(store, cache)
    with Loader(data.train, batch=1, seed=0, prefetch=1, block=1) as batches:
        next(batches)
        # Of the first batch and one after it there are two at most.
        until(lambda: len(set(store.reads[2:])) > 3)
        batches.close()
    data.train.want(np.arange(len(data.train)))
    data.train.take(np.arange(len(data.train)))
    assert len(store.reads) == 2 + 8


def test_shards_are_fetched_side_by_side(folder: Path, cache: ShardCache) -> None:
    store = Counted(folder)
    data = opened(store, cache)
    object.__setattr__(store, "gate", threading.Barrier(4))  # none of them passes alone
    data.train.take(np.flatnonzero(data.train._rows < 4 * 7))
    assert len(store.reads) == 2 + 4


def test_of_two_that_need_a_shard_one_fetches_it(folder: Path, cache: ShardCache) -> None:
    store = Counted(folder)
    pair = [opened(store, cache) for _ in range(2)]  # as in two processes: nothing is shared but the folder
    images: list[list[int]] = [[], []]

    def take(i: int) -> None:
        images[i] = pair[i].train.take(np.arange(len(pair[0].train)))[0][:, 0, 0, 0].tolist()

    threads = [threading.Thread(target=take, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (
        images[0] == images[1] == open_dataset(folder).train.take(np.arange(len(pair[0].train)))[0][:, 0, 0, 0].tolist()
    )
    assert len(store.reads) == 4 + 8
    assert not list(cache.folder.glob(".*.part"))


def test_the_least_recently_used_make_room(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder / "shard-00000.safetensors").stat().st_size
    cache = ShardCache(tmp_path / "shards", 3 * size)
    store = Counted(folder)
    data = opened(store, cache)
    monkeypatch.setattr(shards, "SIGN_OF_LIFE", 0.0)
    rows = data.train._rows
    in_shard = [int(np.flatnonzero(rows // 7 == number)[0]) for number in range(5)]
    names = [entry.sha256 for entry in data.manifest.shards]
    for number in (0, 1, 2):
        data.train.take(np.array([in_shard[number]]))
        os.utime(cache.folder / f"{names[number]}.safetensors", (number + 1, number + 1))
    data.train.take(np.array([in_shard[0]]))  # used again: no longer the oldest
    data.train.take(np.array([in_shard[3]]))
    assert {path.stem for path in kept(cache)} == {names[0], names[2], names[3]}
    assert len(data.train._shards._held) == 3  # type: ignore[attr-defined]  # nor mapped, which would hold its room
    data.train.take(np.array([in_shard[1]]))
    assert store.reads[-1] == "shard-00001.safetensors"
    for path in kept(cache):
        path.unlink()
    assert data.train.take(np.array([in_shard[0]]))[0].shape == (1, 1, 4, 4)
    assert store.reads[-1] == "shard-00000.safetensors"


def test_a_damaged_copy_is_fetched_again(folder: Path, cache: ShardCache) -> None:
    data = opened(Counted(folder), cache)
    data.train.take(np.arange(40))
    path = cache.folder / f"{data.manifest.shards[2].sha256}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\7")  # rot, or a power cut
    store = Counted(folder)
    opened(store, cache).train.take(np.arange(40))
    assert store.reads[2:] == ["shard-00002.safetensors"]
    assert path.read_bytes() == whole


def test_damage_where_it_lies_is_named_and_not_kept(folder: Path, cache: ShardCache) -> None:
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\7")
    data = opened(Counted(folder), cache)
    with pytest.raises(ShardError, match=r"store/shard-00001.safetensors: its sha256 is not(.|\n)*monge shard"):
        data.train.take(np.arange(40))
    with Loader(data.train, batch=40, seed=0) as batches, pytest.raises(ShardError, match="shard-00001"):
        next(batches)
    assert data.manifest.shards[1].sha256 not in {path.stem for path in kept(cache)}
    path.write_bytes(whole)
    assert len(data.train.take(np.arange(40))[0]) == 40


def test_what_is_no_shard_is_named(folder: Path, cache: ShardCache) -> None:
    entry = open_dataset(folder).manifest.shards[0]
    for data, message in (
        (b"no arrays", "not a safetensors file"),
        (pack_arrays({"images": np.zeros((6, 1, 4, 4), np.uint8)}), "does not hold 7 images"),
        (pack_arrays({"labels": np.zeros(7)}), "does not hold 7 images"),
    ):
        (folder / entry.file).write_bytes(data)
        document = (folder / "manifest.json").read_text().replace(entry.sha256, hashlib.sha256(data).hexdigest())
        (folder / "manifest.json").write_text(document)
        entry = open_stored(Counted(folder), "store", cache).manifest.shards[0]
        with pytest.raises(ShardError, match=f"store/{entry.file}: .*{message}"):
            opened(Counted(folder), cache).train.take(np.arange(4))


def test_a_failure_is_told_and_tried_again(folder: Path, cache: ShardCache) -> None:
    store = Counted(folder)
    data = opened(store, cache)
    store.failing.add("shard-00003.safetensors")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"store/shard-00003.safetensors: the server failed"):
            data.train.take(np.arange(40))
    store.failing.clear()
    assert len(data.train.take(np.arange(40))[0]) == 40


def test_what_a_store_raises_leaves_nothing_behind(folder: Path, cache: ShardCache) -> None:
    def gone() -> bytes:
        raise FileNotFoundError(2, "No such file or directory")

    for _ in range(2):
        with pytest.raises(StorageError, match=r"cannot keep it: No such file"):
            cache.get("0" * 64, "it", gone)
    assert [path.name for path in cache.folder.iterdir()] == []


def test_few_large_shards_are_in_memory_at_a_time(
    folder: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for most, at_once in ((2**28, shards.AT_ONCE), (2 * 7 * 16 + 1, 2), (1, 1)):
        monkeypatch.setattr(shards, "FETCH_BYTES", most)
        data = opened(Counted(folder), cache)
        assert data.train._shards._threads._max_workers == at_once  # type: ignore[attr-defined]
        assert len(data.train.take(np.arange(40))[0]) == 40


def test_a_manifest_or_index_that_is_damaged(folder: Path, cache: ShardCache) -> None:
    for name, message in (("index.safetensors", "its sha256 is not"), ("manifest.json", "not a manifest")):
        (folder / name).write_bytes(b"damaged")
        with pytest.raises(ShardError, match=f"store/{name}: {message}"):
            opened(Counted(folder), cache)


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("a file")
    data = opened(Counted(folder), ShardCache(tmp_path / "shards", 1))
    with pytest.raises(StorageError, match=r"shards: cannot keep store/shard(.|\n)*MONGE_SHARD_CACHE"):
        data.train.take(np.arange(4))
