"""Data loading: ``python -m benchmarks.data [--quick] [--json FILE] [--only SECTION]``.

Compares loading from shards with a tensor in memory and with Ray Data; images of 224 pixels from shards with decoding
JPEGs at every epoch; and sharding by Ray workers with decoding alone. Also measures the time to the first batch of a
data set in S3 (moto's server, in a separate process on this machine), and the memory of a loader over ten epochs.
WebDataset is included if the extra ``bench`` is installed. mosaicml-streaming is not included: its requirements
conflict with those of this project.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.report import Row, in_turns, markdown, table, write_json
from benchmarks.transport import processor
from pipelines.data.decode import decode
from pipelines.data.loader import Loader, ShardedDataset, open_dataset
from pipelines.spec import DataSpec
from services.cluster import ray_environment, start_cluster
from services.settings import Settings

BATCH = 256
EPOCHS = 10
SIDE, SIZE = 64, 224
SHIFT = 8
SHARD_MIB = 64
FEED_BAR, RAY_DATA_BAR, JPEG_BAR, SCALING_BAR, COLD_SECONDS, GROWTH_MIB = 0.95, 5.0, 1.0, 1.8, 2.0, 16.0


@dataclass(frozen=True)
class DataScale:
    """Sizes of the measurements."""

    images: int
    photos: int
    sharded: int
    repeats: int


FULL, QUICK = DataScale(100_000, 4_000, 100_000, 5), DataScale(100_000, 400, 4_000, 2)


def digits(home: Path, count: int) -> ShardedDataset:
    """Return a data set of 28 × 28 noise images; created on first use."""
    from services.sharding.dataset import shard_dataset

    folder = home / "digits"
    if not folder.exists():
        folder.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        np.savez(folder / "images.npz", images=pixels, labels=np.arange(count) % 10)
        shard_dataset(DataSpec(source=str(folder / "images.npz")), folder / "shards", folder / "cache", workers=0)
    return open_dataset(folder / "shards")


def feeding(home: Path, scale: DataScale) -> list[Row]:
    """Measure the microseconds per batch, ready as a tensor, over an epoch with a full shuffle."""
    import ray.data

    train = digits(home, scale.images).train
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    images, labels = train.take(np.arange(len(train)))
    steps = len(train) // BATCH
    epoch = iter(range(1_000_000))

    def ours() -> None:
        with Loader(train, BATCH, seed=0, start_step=next(epoch) * steps) as batches:
            for _ in range(steps):
                next(batches)

    def in_memory() -> None:
        order = torch.randperm(len(images))
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            _ = images[chosen], labels[chosen]

    mine, memory = in_turns(ours, in_memory, repeats=2 * scale.repeats + 1)
    some = len(images) if scale is FULL else len(images) // 4
    data = ray.data.from_numpy(images[:some].numpy())

    def by_ray() -> None:
        for _ in data.random_shuffle().iter_torch_batches(batch_size=BATCH):
            pass

    (theirs,) = in_turns(by_ray, repeats=min(3, scale.repeats))
    per = 1e3 / steps
    name = "28 × 28, batches of 256, full shuffle"
    return [
        Row(name, mine * per, memory * per, "tensor in memory", "µs/batch", FEED_BAR),
        Row(
            name, mine * per, theirs * 1e3 / (some / BATCH),
            "Ray Data, random_shuffle, iter_torch_batches", "µs/batch", RAY_DATA_BAR,
        ),
    ]  # fmt: skip


def photographs(folder: Path, count: int, width: int, height: int) -> list[Path]:
    """Create distinct JPEGs in ten class folders: smooth colours, grain, and the image number as a row of bars."""
    random = np.random.default_rng(0)
    bases = []
    for _ in range(50):
        small = Image.fromarray(random.integers(0, 256, (10, 12, 3), np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        bases.append((smooth + random.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))
    paths = [folder / f"class{i % 10}" / f"{i:06d}.jpg" for i in range(count)]
    for label in range(10):
        (folder / f"class{label}").mkdir(parents=True)
    for i, path in enumerate(paths):
        pixels = bases[i % len(bases)].copy()
        bits = np.unpackbits(np.array([i], ">u4").view(np.uint8))[8:]
        pixels[20:28, : 24 * (width // 24)] = (bits.repeat(width // 24) * 255)[None, :, None]
        Image.fromarray(pixels).save(path, quality=90)
    return paths


def changed(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image, (b, 3, h, w) uint8, at random and shift it by up to eight pixels: the common augmentation."""
    padded = torch.nn.functional.pad(images, [SHIFT] * 4)
    out = torch.empty_like(images)
    size = images.shape[-1]
    draws = torch.randint(0, 2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    for i, ((down, across), mirror) in enumerate(zip(draws, mirrored, strict=True)):
        crop = padded[i, :, down : down + size, across : across + size]
        out[i] = crop.flip(2) if mirror else crop
    return out


class ImageFolder(torch.utils.data.Dataset[torch.Tensor]):
    """JPEG files, decoded and augmented on access, like torchvision's class of the same name."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> torch.Tensor:
        return decoded(self.paths[place].read_bytes())


def decoded(data: bytes) -> torch.Tensor:
    """Decode and augment a JPEG, (3, h, w) uint8."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    return changed(torch.from_numpy(np.ascontiguousarray(pixels))[None], torch.default_generator)[0]


def archives(folder: Path, paths: list[Path]) -> list[str]:
    """Create four tar files in the WebDataset layout."""
    folder.mkdir()
    names = []
    for number in range(4):
        names.append(str(folder / f"{number}.tar"))
        with tarfile.open(names[-1], "w") as archive:
            for path in paths[number::4]:
                archive.add(path, path.name)
    return names


def webdataset(names: list[str], batch: int) -> Iterable[Any]:
    """Create a WebDataset loader over tar files, with a shuffle buffer of a thousand and two workers."""
    import webdataset as wds

    data = wds.WebDataset(names, shardshuffle=4).shuffle(1000).to_tuple("jpg").map_tuple(decoded)
    return torch.utils.data.DataLoader(data.map(lambda parts: parts[0]), batch, num_workers=2, persistent_workers=True)


def decoding(home: Path, scale: DataScale) -> list[Row]:
    """Compare augmented images of 224 pixels from shards, already decoded, with files decoded at every epoch."""
    from services.sharding.dataset import shard_dataset

    paths = photographs(home / "photos", scale.photos, SIZE, SIZE)
    spec = DataSpec(source=str(home / "photos"), size=SIZE, channels=3)
    shard_dataset(spec, home / "photo-shards", home / "cache", workers=0)
    train = open_dataset(home / "photo-shards").train
    generator = torch.Generator().manual_seed(0)
    batch = 64
    steps = len(train) // batch
    files = torch.utils.data.DataLoader(ImageFolder(paths), batch, shuffle=True, num_workers=2, persistent_workers=True)

    def ours() -> None:
        with Loader(train, batch, seed=0) as batches:
            for _ in range(steps):
                changed(next(batches).images, generator)

    peers: dict[str, Iterable[Any]] = {"DataLoader over JPEG files, 2 workers": files}
    if importlib.util.find_spec("webdataset"):
        peers["WebDataset, 2 workers"] = webdataset(archives(home / "tars", paths), batch)
    else:
        print("  WebDataset is not installed (extra: bench), and not in the table", flush=True)
    mine, *theirs = in_turns(
        ours, *(lambda peer=peer: sum(1 for _ in peer) for peer in peers.values()), repeats=scale.repeats
    )
    bare = bare_seconds(paths, 2, SIZE)
    ours_each, count = mine * 1e3 / (steps * batch), len(paths)
    name = "224 × 224, shuffled, mirrored and moved; ours from raw shards"
    rows = [
        Row(name, ours_each, taken * 1e3 / count, peer, "µs/image", JPEG_BAR)
        for peer, taken in zip(peers, theirs, strict=True)
    ]
    return [*rows, Row(name, ours_each, bare * 1e6 / count, "JPEG decoding alone, 2 processes", "µs/image", 0.0)]


def decode_all(files: list[Path], size: int) -> None:
    """Read and decode files, and discard the result."""
    for file in files:
        decode(file.read_bytes(), size, 3)


def bare_seconds(files: list[Path], processes: int, size: int) -> float:
    """Measure the seconds in which plain processes, started before, decode all files."""
    parts = [files[i::processes] for i in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(decode_all, [(part[:1], size) for part in parts], chunksize=1)
        started = time.perf_counter()
        pool.starmap(decode_all, [(part, size) for part in parts], chunksize=1)
        return time.perf_counter() - started


@contextmanager
def watched() -> Iterator[dict[int, int]]:
    """Yield the peak resident memory in bytes of each worker below this process, updated continuously."""
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "_write_shard" in " ".join([process.name(), *process.cmdline()]):
                        memory = process.memory_info()  # memory mapped from the object store does not count
                        peaks[process.pid] = max(peaks.get(process.pid, 0), memory.rss - memory.shared)
                except psutil.Error:
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def import_and_stay(seconds: float) -> None:
    """Import the modules of a worker, and run long enough that each worker gets one such task."""
    import services.sharding.dataset  # noqa: F401

    time.sleep(seconds)


def sharding(home: Path, scale: DataScale) -> list[Row]:
    """Measure sharding JPEGs of 96 × 80 pixels to 64 × 64, listing included, with running Ray workers."""
    import ray

    from services.sharding.dataset import shard_dataset

    files = photographs(home / "small", scale.sharded, 96, 80)
    spec = DataSpec(source=str(home / "small"), size=SIDE, channels=3)
    ray.get([ray.remote(num_cpus=1)(import_and_stay).remote(2.0) for _ in range(2)])
    # Small enough that two workers end at nearly the same time, and within the memory limit.
    shard_bytes = min(SHARD_MIB * 2**20, len(files) // 32 * 3 * SIDE**2)

    def milliseconds(workers: int, turn: int) -> float:
        started = time.perf_counter()
        out = home / f"out-{workers}-{turn}"
        shard_dataset(spec, out, home / "cache", workers, shard_bytes=shard_bytes)
        return (time.perf_counter() - started) * 1e3

    with watched() as peaks:
        # In turns; no warm-up, because the workers run and have imported everything.
        taken = [(milliseconds(1, turn), milliseconds(2, turn)) for turn in range(1 if scale is FULL else 2)]
    one, two = (statistics.median(column) for column in zip(*taken, strict=True))
    bare = bare_seconds(files, 2, SIDE)
    count = len(files)
    print(f"  sharding {count:,} images: {count / one * 1e3:,.0f} and {count / two * 1e3:,.0f} images/s", flush=True)
    return [
        Row("sharding, 2 workers", two * 1e3 / count, one * 1e3 / count, "1 worker", "µs/image", SCALING_BAR),
        Row(
            "sharding, 2 workers", two * 1e3 / count, bare * 1e6 / count, "decoding alone, 2 processes", "µs/image", 0.0
        ),
        Row(
            f"memory of a sharding worker, {shard_bytes / 2**20:.0f} MiB shards",
            max(peaks.values(), default=0) / 2**20, 700.0, "limit", "MiB", 1.0,
        ),
    ]  # fmt: skip


@contextmanager
def s3_server() -> Iterator[Settings]:
    """Run moto's server in a separate process, with an empty bucket ``images``; yield settings for it."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "NO_PROXY": "127.0.0.1"}
    import boto3

    program = (
        "import sys, threading; from moto.server import ThreadedMotoServer; "
        "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False); server.start(); "
        "print(server.get_host_and_port()[1], flush=True); sys.stdin.read(); server.stop()"
    )
    quiet: dict[str, Any] = {"stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **quiet
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        try:
            boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="images")
            yield Settings(s3_endpoint_url=url, s3_region="us-east-1", s3_path_style=True)
        finally:
            server.stdin.close()


def cold(home: Path, scale: DataScale) -> list[Row]:
    """Measure the seconds from an S3 address to the first batch of 256 out of 100,000 images with a full shuffle."""
    from services.storage.datasets import open_data
    from services.storage.open import open_storage

    data = digits(home, scale.images)
    with s3_server() as settings:
        store = open_storage("s3://images/cold", settings)
        for path in Path(data.address).iterdir():
            if path.is_file() and not path.name.startswith("."):
                store.write(path.name, path.read_bytes())
        turns = iter(range(100))

        def first() -> None:
            fresh = settings.model_copy(update={"shard_cache": home / f"shards-{next(turns)}"})
            with Loader(open_data("s3://images/cold", fresh).train, BATCH, seed=0) as batches:
                next(batches)

        (milliseconds,) = in_turns(first, repeats=scale.repeats)
    name = f"first batch, {scale.images:,} images of 28 × 28 in S3, nothing in the cache"
    return [Row(name, milliseconds / 1e3, COLD_SECONDS, "limit", "s", 1.0)]


def memory(home: Path, scale: DataScale) -> list[Row]:
    """Measure the memory growth of the process in MiB between the second epoch and the tenth."""
    train = digits(home, scale.images).train
    steps = len(train) // BATCH
    process = psutil.Process()
    seen = []
    with Loader(train, BATCH, seed=0) as batches:
        for _ in range(EPOCHS):
            for _ in range(steps):
                next(batches)
            seen.append(process.memory_info().rss / 2**20)
    name = f"memory of a loader, epoch {EPOCHS} less epoch 2"
    return [Row(name, max(seen[-1] - seen[1], 0.01), GROWTH_MIB, "limit", "MiB", 1.0)]


SECTIONS = {"memory": memory, "cold": cold, "decoding": decoding, "sharding": sharding, "feeding": feeding}
NEED_RAY = {"feeding", "sharding"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer images and repeats, under a minute; too few for two workers to show their worth",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="keep them as a table")
    parser.add_argument("--only", choices=list(SECTIONS), help="one section")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    chosen = [name for name in SECTIONS if arguments.only in (None, name)]
    print(processor(), flush=True)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="data-") as temporary:
        home = Path(temporary)
        settings = Settings(home=home / "home")
        os.environ.update(ray_environment(settings))  # Ray reads it at import
        for name in chosen:
            if name in NEED_RAY:
                import ray

                if not ray.is_initialized():
                    start_cluster(settings, 2)
            rows += SECTIONS[name](home, scale)
        if NEED_RAY & set(chosen):
            ray.shutdown()
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)
    if arguments.markdown:
        arguments.markdown.write_text(f"{processor()}.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
