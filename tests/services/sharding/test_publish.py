"""Data sets of shards that stay: made in a folder or in S3, and named by jobs as their source."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipelines.data import shard
from pipelines.data.loader import open_dataset
from pipelines.errors import ShardError, SourceError, SpecError, StorageError
from pipelines.spec import DataSpec
from services.cli import app
from services.settings import Settings
from services.sharding.dataset import dataset_folder, shard_dataset
from services.sharding.publish import shard_to
from services.storage.open import open_storage
from services.storage.s3 import S3Storage
from tests.services.storage.faults import FaultyServer

N = 40
BUCKET = "s3://images/sharded"


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SHARD_IMAGES", 6)


@pytest.fixture
def s3(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    for name, value in {"ENDPOINT_URL": server.url, "REGION": "us-east-1", "PATH_STYLE": "1", "ATTEMPTS": "1"}.items():
        monkeypatch.setenv(f"MONGE_S3_{name}", value)
    return server


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    images = np.random.default_rng(0).integers(0, 256, (N, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", images=images, labels=np.arange(N) % 3)
    return DataSpec(source=str(tmp_path / "some.npz"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_job_takes_it_as_it_is(spec: DataSpec, home: Settings, tmp_path: Path) -> None:
    manifest = shard_to(spec, str(tmp_path / "out"), home, workers=0)
    before = contents(tmp_path / "out")
    used = DataSpec(source=str(tmp_path / "out"))
    folder = dataset_folder(home.home, used)
    assert folder == tmp_path / "out"
    seen: list[tuple[int, int]] = []
    again = shard_dataset(used, folder, tmp_path / "cache", 0, lambda done, total: seen.append((done, total)))
    assert again == manifest
    assert seen == [(N, N)]
    assert contents(tmp_path / "out") == before
    assert len(open_dataset(folder).train) == sum(manifest.counts["train"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 5}, "data.size: 5 received, and .* of 8"), ({"channels": 3}, "data.channels: 3 received, and .* of 1")],
)
def test_images_of_another_shape_are_not_in_it(
    spec: DataSpec, home: Settings, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    out = tmp_path / "out"
    shard_to(spec, str(out), home, workers=0)
    with pytest.raises(SpecError, match=message):
        shard_dataset(DataSpec(source=str(out), **change), out, tmp_path / "cache", 0)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="is sharded already"):
        shard_to(DataSpec(source=str(out)), str(tmp_path / "elsewhere"), home, workers=0)


def test_half_of_it_is_no_source(
    spec: DataSpec, home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done >= 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard_to(spec, str(out), home, workers=0, on_images=interrupt)
    with pytest.raises(SourceError, match="not finished") as caught:
        dataset_folder(home.home, DataSpec(source=str(out)))
    assert "monge shard" in str(caught.value.cure)
    seen: list[int] = []
    shard_to(spec, str(out), home, workers=0, on_images=lambda done, total: seen.append(done))
    assert seen[0] == 18
    shard_to(spec, str(tmp_path / "at once"), home, workers=0)
    assert contents(out) == contents(tmp_path / "at once")


def test_other_files_are_left_alone(spec: DataSpec, home: Settings, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(ShardError, match=r"holds other files, as thesis.tex"):
        shard_to(spec, str(tmp_path / "out"), home, workers=0)
    with pytest.raises(ShardError, match="is a file"):
        shard_to(spec, str(tmp_path / "out" / "thesis.tex"), home, workers=0)
    assert contents(tmp_path / "out") == {"thesis.tex": b"mine"}


def test_a_full_disk_is_said(spec: DataSpec, home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shard, "write_arrays", full)
        with pytest.raises(StorageError, match="out: cannot be written: No space left"):
            shard_to(spec, str(tmp_path / "out"), home, workers=0)
    shard_to(spec, str(tmp_path / "out"), home, workers=0)


def test_shards_are_as_large_as_asked(spec: DataSpec, home: Settings, tmp_path: Path) -> None:
    manifest = shard_to(spec, str(tmp_path / "out"), home, workers=0, shard_bytes=10 * 64 + 63)
    assert [entry.count for entry in manifest.shards] == [10, 10, 10, 10]
    assert len(shard_to(spec, str(tmp_path / "tiny"), home, workers=0, shard_bytes=1).shards) == N


def test_of_twins_the_first_is_kept(spec: DataSpec, home: Settings, tmp_path: Path) -> None:
    with np.load(spec.source) as arrays:
        images, labels = arrays["images"].copy(), arrays["labels"]
    images[[7, 30]] = images[4]
    np.savez(spec.source, images=images, labels=labels)
    plain = shard_to(spec, str(tmp_path / "plain"), home, workers=0)
    assert sum(sum(counts.values()) for counts in plain.counts.values()) == N
    manifest = shard_to(spec.model_copy(update={"drop_twins": True}), str(tmp_path / "out"), home, workers=0)
    assert sum(sum(counts.values()) for counts in manifest.counts.values()) == N - 2
    assert manifest.quarantined == 2
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["name"][-4:].lstrip("0123456789abcdef") for line in listed] == ["[7]", "[30]"]


def test_in_s3_and_back(spec: DataSpec, home: Settings, s3: FaultyServer, settings: Settings, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"home": home.home})
    seen: list[tuple[int, int]] = []
    manifest = shard_to(spec, BUCKET, settings, 0, on_files=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 10) for done in range(11)]
    shard_to(spec, str(tmp_path / "here"), home, workers=0)
    store = open_storage(BUCKET, settings)
    there = {entry.key: store.read(entry.key) for page in store.pages() for entry in page}
    assert there == contents(tmp_path / "here")

    used = DataSpec(source=BUCKET)
    folder = dataset_folder(tmp_path / "other home", used)
    assert shard_dataset(used, folder, tmp_path / "other home" / "cache", 0) == manifest
    images, _ = open_dataset(folder).train.take(np.array([3]))
    assert np.array_equal(images, open_dataset(tmp_path / "here").train.take(np.array([3]))[0])


def test_an_upload_goes_on(
    spec: DataSpec,
    home: Settings,
    s3: FaultyServer,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings = settings.model_copy(update={"home": home.home})

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard_to(spec, BUCKET, settings, 0, on_files=interrupt)
    with pytest.raises(SourceError, match="not finished"):
        dataset_folder(tmp_path / "other home", DataSpec(source=BUCKET))
    open_storage(BUCKET, settings).write("shard-00001.safetensors", b"half")
    written: list[str] = []
    original = S3Storage.write
    monkeypatch.setattr(S3Storage, "write", lambda self, key, data: (written.append(key), original(self, key, data))[1])
    shard_to(spec, BUCKET, settings, 0)
    numbers = [1, 4, 5, 6]
    files = [f"shard-{number:05d}.safetensors" for number in numbers]
    assert written == [*files, "index.safetensors", "quarantine.jsonl", "manifest.json"]


def test_what_lies_in_s3_is_not_overwritten(
    spec: DataSpec, home: Settings, s3: FaultyServer, settings: Settings
) -> None:
    settings = settings.model_copy(update={"home": home.home})
    open_storage(BUCKET, settings).write("thesis.tex", b"mine")
    with pytest.raises(ShardError, match=r"holds other objects, as thesis.tex"):
        shard_to(spec, BUCKET, settings, 0)
    elsewhere = "s3://images/elsewhere"
    shard_to(spec, elsewhere, settings, 0)
    with pytest.raises(ShardError, match="elsewhere: holds another data set"):
        shard_to(spec.model_copy(update={"channels": 3}), elsewhere, settings, 0)


def test_the_command(spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGE_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    arguments = ["shard", spec.source, str(out), "--workers", "0", "--channels", "3", "--set", "test_fraction=0.5"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "40 images of (3, 8, 8) in 7 shards" in done.output
    assert "data.channels=3" in done.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["name"] == spec.source
    assert sum(manifest["counts"]["test"].values()) > 15
    with pytest.raises(SpecError, match=r"sise: no such field"):
        CliRunner().invoke(app, [*arguments, "--set", "sise=3"], catch_exceptions=False)
