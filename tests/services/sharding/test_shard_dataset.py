"""Sharding in this process, on a Ray cluster, concurrently, and after a kill."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data import shard
from pipelines.data.loader import open_dataset
from pipelines.data.manifest import Manifest
from pipelines.data.shard import RECEIPTS
from pipelines.errors import ShardError, SourceError, TooManyBadImagesError
from pipelines.spec import DataSpec
from services.sharding import dataset
from services.sharding.dataset import dataset_address, shard_dataset

N = 40


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SHARD_IMAGES", 6)


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "Some Images.npz", images=images, labels=np.arange(N) % 3)
    return DataSpec(source=str(tmp_path / "Some Images.npz"))


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of a sharding except its lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != dataset.LOCK}


@pytest.fixture
def expected(spec: DataSpec, tmp_path: Path) -> dict[str, bytes]:
    """Return the files of an undisturbed sharding in this process."""
    shard_dataset(spec, tmp_path / "expected", tmp_path / "cache", workers=0)
    return files(tmp_path / "expected")


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_on_a_cluster(
    ray_cluster: None, spec: DataSpec, tmp_path: Path, expected: dict[str, bytes], workers: int | None
) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    manifest = shard_dataset(spec, out, tmp_path / "cache", workers, lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, N)
    assert seen[-1] == (N, N)
    assert seen == sorted(seen)
    assert len(seen) == 1 + len(manifest.shards)
    assert files(out) == expected
    assert len(open_dataset(out).train) == sum(manifest.counts["train"].values())


def test_a_cluster_without_a_free_cpu_is_not_waited_for_in_silence(
    ray_cluster: None,
    spec: DataSpec,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dataset, "SILENCE", 1e-6)
    shard_dataset(spec, tmp_path / "out", tmp_path / "cache", workers=2)
    assert "no shard written for 1e-06 s" in caplog.text
    assert files(tmp_path / "out") == expected


def test_errors_of_a_task_are_ours(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / name / f"{i}.png")
    spec = DataSpec(source=str(folder))
    source = dataset.open_source(spec, tmp_path / "cache")
    (folder / "bee" / "3.png").unlink()
    monkeypatch.setattr(dataset, "open_source", lambda spec, cache: source)
    with pytest.raises(SourceError, match=r"3.png: cannot be read") as caught:
        shard_dataset(spec, tmp_path / "out", tmp_path / "cache")
    assert type(caught.value) is SourceError
    assert caught.value.hint


def test_a_finished_data_set_is_left_alone(spec: DataSpec, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "expected"
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    seen: list[tuple[int, int]] = []
    shard_dataset(spec, out, tmp_path / "cache", 0, lambda done, total: seen.append((done, total)))
    assert seen == [(N, N)]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_data_set_is_not_overwritten(spec: DataSpec, tmp_path: Path, expected: dict[str, bytes]) -> None:
    other = spec.model_copy(update={"channels": 3})
    with pytest.raises(ShardError, match=r"contains another data set, made from an earlier .*Some Images.npz"):
        shard_dataset(other, tmp_path / "expected", tmp_path / "cache", workers=0)
    assert files(tmp_path / "expected") == expected


KILLED = """
import json, os, sys
from pathlib import Path
from typing import Any
from pipelines.data import shard
from pipelines.spec import DataSpec
from services.sharding.dataset import shard_dataset

spec, out, cache = json.loads(sys.argv[1])
shard.SHARD_IMAGES = 6
shard_dataset(
    DataSpec(**spec), Path(out), Path(cache), 0, lambda done, total: os._exit(9) if done >= 18 else None
)
"""


def test_after_a_kill_the_work_goes_on(spec: DataSpec, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    arguments = json.dumps([spec.model_dump(), str(out), str(tmp_path / "cache")])
    killed = subprocess.run([sys.executable, "-c", KILLED, arguments], timeout=120, capture_output=True)
    assert killed.returncode == 9, killed.stderr.decode()
    assert not (out / "manifest.json").exists()
    kept = {path.name: path.stat().st_ino for path in out.glob("shard-*")}
    assert len(kept) == 3
    (out / "shard-00001.safetensors").write_bytes(b"half a fi")  # what a power cut may leave
    seen: list[int] = []
    shard_dataset(spec, out, tmp_path / "cache", 0, lambda done, total: seen.append(done))
    assert seen[0] == 12
    assert files(out) == expected
    again = {path.name: path.stat().st_ino for path in out.glob("shard-*")}
    assert again["shard-00000.safetensors"] == kept["shard-00000.safetensors"]
    assert again["shard-00002.safetensors"] == kept["shard-00002.safetensors"]


@pytest.mark.parametrize("locked", [True, False])
def test_two_jobs_at_once(
    spec: DataSpec, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    """With the lock, one job does the work; without it, both do, without conflicts."""
    if not locked:
        monkeypatch.setattr(dataset, "PATIENCE", 0.0)
    out = tmp_path / "out"
    first_is_inside, second_has_started = threading.Event(), threading.Event()
    written: dict[str, int] = {}
    original = dataset.write_shard

    def write(*arguments: object) -> object:
        name = threading.current_thread().name
        written[name] = written.get(name, 0) + 1
        if name == "first" and not first_is_inside.is_set():
            first_is_inside.set()
            assert second_has_started.wait(60)
        if name == "second":
            second_has_started.set()
        return original(*arguments)

    monkeypatch.setattr(dataset, "write_shard", write)
    monkeypatch.setattr(dataset.log, "info", lambda *_: second_has_started.set())
    jobs = [
        threading.Thread(target=shard_dataset, args=(spec, out, tmp_path / "cache", 0), name=name)
        for name in ("first", "second")
    ]
    jobs[0].start()
    assert first_is_inside.wait(60)
    jobs[1].start()
    for job in jobs:
        job.join(60)
        assert not job.is_alive()
    assert files(out) == expected
    assert written["first"] == 7
    assert ("second" in written) is not locked


def test_a_job_that_another_overtakes_takes_its_data_set(
    spec: DataSpec, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original = dataset.write_manifest

    def overtaken(*arguments: Any) -> Manifest:
        original(*arguments)
        shutil.rmtree(out / RECEIPTS)
        return original(*arguments)

    monkeypatch.setattr(dataset, "write_manifest", overtaken)
    seen: list[int] = []
    manifest = shard_dataset(spec, out, tmp_path / "cache", 0, lambda done, total: seen.append(done))
    assert manifest.images == seen[-1]
    assert files(out) == expected


def test_too_many_bad_images_stop_the_job_early(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "images" / name / f"{i:02d}.png").write_bytes(b"damaged")
    spec = DataSpec(source=str(tmp_path / "images"), size=8)
    seen: list[int] = []
    with pytest.raises(TooManyBadImagesError, match=r"ant/00.png"):
        shard_dataset(spec, tmp_path / "out", tmp_path / "cache", 0, lambda done, total: seen.append(done))
    assert seen == [0]


def test_the_folder_of_a_data_set(spec: DataSpec, tmp_path: Path) -> None:
    home = tmp_path / "home"
    folder = dataset_address(home, spec)
    assert folder == dataset_address(home, spec)
    assert folder.startswith(str(home / "data" / "some-images-"))
    assert folder != dataset_address(home, spec.model_copy(update={"size": 5}))
    np.savez(spec.source, images=np.zeros((N, 8, 8), np.uint8), labels=np.arange(N) % 4)
    assert folder != dataset_address(home, spec)
    assert "/digits-" in dataset_address(home, DataSpec(source="digits"))
