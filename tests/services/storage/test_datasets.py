"""A sharded data set in S3, opened and read from a failing server."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import shard
from pipelines.data.loader import Loader, open_dataset
from pipelines.errors import ObjectNotFoundError, ShardError, StorageError
from pipelines.spec import DataSpec
from services.settings import Settings
from services.sharding.dataset import shard_dataset
from services.storage.datasets import open_data
from services.storage.open import open_storage
from tests.services.storage.faults import FaultyServer

ADDRESS = "s3://images/shards"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a data set of 40 images in shards of 6."""
    monkeypatch.setattr(shard, "SHARD_IMAGES", 6)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", images=images, labels=np.arange(40) % 3)
    shard_dataset(DataSpec(source=str(tmp_path / "some.npz")), tmp_path / "here", tmp_path / "cache", workers=0)
    return tmp_path / "here"


@pytest.fixture
def there(here: Path, settings: Settings, server: FaultyServer, tmp_path: Path) -> Settings:
    """Copy the data set to S3; return settings with a separate cache."""
    store = open_storage(ADDRESS, settings)
    for path in here.iterdir():
        if not path.name.startswith("."):
            store.write(path.name, path.read_bytes())
    server.requests = 0
    return settings.model_copy(update={"home": tmp_path / "home", "s3_attempts": 1, "s3_timeout": 0.5})


def test_batches_are_those_of_the_folder(here: Path, there: Settings, server: FaultyServer) -> None:
    data = open_data(ADDRESS, there)
    assert server.requests == 2
    with Loader(data.train, 8, 1) as ours, Loader(open_dataset(here).train, 8, 1) as theirs:
        for _ in range(9):
            assert np.array_equal(next(ours).images, next(theirs).images)
    assert server.requests == 2 + 7
    assert len(list((there.home / "cache" / "shards").glob("*.safetensors"))) == 7
    assert np.array_equal(open_data(str(here), there).test.labels, data.test.labels)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (403, "access is denied"),
        (404, "object not found"),
        (500, "the server failed 1 times"),
        ("slow", "no complete response"),
        ("reset", "no complete response"),
        ("cut", "no complete response"),
    ],
)
def test_a_fault_names_the_object_and_does_not_last(
    there: Settings, server: FaultyServer, fault: int | str, message: str
) -> None:
    data = open_data(ADDRESS, there)
    server.faults.extend([fault] * 100)  # more than are asked for: what fails early is asked for again
    expected = ObjectNotFoundError if fault == 404 else StorageError
    with pytest.raises(expected, match=rf"{ADDRESS}/shard-0000\d.safetensors: .*{message}"):
        data.train.take(np.arange(len(data.train)))
    server.faults.clear()
    with suppress(StorageError):  # of a shard that was on its way already
        data.train.take(np.arange(len(data.train)))
    assert len(data.train.take(np.arange(len(data.train)))[0]) == len(data.train)


@pytest.mark.parametrize("fault", [403, 500, "reset"])
def test_a_fault_as_it_is_opened(there: Settings, server: FaultyServer, fault: int | str) -> None:
    server.faults.append(fault)
    with pytest.raises(StorageError, match=rf"{ADDRESS}/manifest.json: "):
        open_data(ADDRESS, there)


def test_a_shard_with_another_hash_ends_the_stream(there: Settings) -> None:
    open_storage(ADDRESS, there).write("shard-00002.safetensors", b"another")
    data = open_data(ADDRESS, there)
    message = f"{ADDRESS}/shard-00002.safetensors: its sha256 is not"
    with Loader(data.train, batch=32, seed=0) as batches, pytest.raises(ShardError, match=message):
        next(batches)
