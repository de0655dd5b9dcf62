"""A data set sharded by Ray tasks: one task for each shard, all that binds them in the driver."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from pipelines.data.manifest import MANIFEST, Manifest, read_manifest
from pipelines.data.shard import RECEIPTS, Receipt, bind, check_bad, chunks, finished, write_shard
from pipelines.data.source import Source, fingerprint, open_source
from pipelines.errors import MongeError, ShardError, SourceError, SpecError, StorageError
from pipelines.spec import DataSpec
from services.sharding.fetch import local

log = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE = 600.0
"""Seconds that a job leaves the work to another one that is sharding the same data set."""

SILENCE = 30.0
"""Seconds without a finished shard after which the log says so."""

Progress = Callable[[int, int], None]


def dataset_folder(home: Path, spec: DataSpec) -> Path:
    """The folder of a data set, ``home/data/<slug>-<hash>``: a changed source or preparation gets another one.

    A source in S3 is copied to ``home/cache`` first. One that is sharded already is its own folder.

    Raises:
        SourceError: there is no such source.
        StorageError: S3 refuses, fails or does not answer.
    """
    copied = local(spec, home / "cache")
    if is_sharded(copied):
        return Path(copied.source).expanduser()
    slug = re.sub(r"[^a-z0-9]+", "-", Path(spec.source).stem.lower()).strip("-")[:32]
    return home / "data" / f"{slug or 'images'}-{fingerprint(copied)[:16]}"


def shard_dataset(
    spec: DataSpec,
    destination: Path,
    cache: Path,
    workers: int | None = None,
    on_progress: Progress | None = None,
    shard_bytes: int | None = None,
) -> Manifest:
    """Turn a source of images into a data set of shards; shards of an earlier, interrupted call are kept.

    A source that is such a data set itself, and the destination, is left as it is.

    Args:
        spec: the source and its preparation.
        destination: folder of the data set. On a cluster this, the cache and the source lie on a shared file system.
        cache: folder of downloads.
        workers: shards written at a time, by default as many as the cluster has CPUs; 0 to write them in this
            process, without Ray, which must be initialised otherwise.
        on_progress: called with the images done and the images in all, in this process.
        shard_bytes: pixels of one shard at most; see :func:`pipelines.data.shard.chunks`.

    Raises:
        SourceError: the source cannot be found, fetched or trusted.
        SpecError: the source is sharded already, and for other images.
        StorageError: S3 refuses, fails or does not answer; or the destination cannot be written.
        TooManyBadImagesError: more images are unreadable than the spec allows.
        ShardError: the destination holds another data set.
    """
    destination = destination.resolve()
    report = on_progress or (lambda done, total: None)
    copied = local(spec, cache)
    if is_sharded(copied):
        manifest = taken_as_it_is(copied, destination)
        report(manifest.images, manifest.images)
        return manifest
    source = open_source(copied, cache)
    total = len(source)
    with _told(destination):
        destination.mkdir(parents=True, exist_ok=True)
    with _told(destination), _alone(destination):
        if (destination / MANIFEST).exists():
            manifest = _same(destination, source)
            report(total, total)
            return manifest
        spans = chunks(total, source.image, shard_bytes)
        receipts = {
            number: receipt
            for number, span in enumerate(spans)
            if (receipt := finished(source, destination, number, *span))
        }
        missing = [(number, *span) for number, span in enumerate(spans) if number not in receipts]
        done = sum(receipt.stop - receipt.start for receipt in receipts.values())
        report(done, total)
        for number, receipt in _write(source, destination, missing, workers):
            receipts[number] = receipt
            done += receipt.stop - receipt.start
            check_bad(list(receipts.values()), total, spec)
            report(done, total)
        manifest = bind(source, spec, destination, [receipts[number] for number in range(len(spans))])
        shutil.rmtree(destination / RECEIPTS, ignore_errors=True)
        return manifest


def is_sharded(spec: DataSpec) -> bool:
    """Whether a source on this machine is a data set of shards.

    Raises:
        SourceError: it is one that is not finished.
    """
    folder = Path(spec.source).expanduser()
    if (folder / MANIFEST).is_file():
        return True
    if any((folder / RECEIPTS).glob("*.json")):
        raise SourceError(
            f"{spec.source}: a data set of shards that is not finished",
            cure="start the `monge shard` that was interrupted again: it goes on where it stopped",
        )
    return False


def taken_as_it_is(spec: DataSpec, destination: Path) -> Manifest:
    """The manifest of a source that is sharded already.

    Raises:
        SpecError: the spec asks for images of another shape, or for shards elsewhere.
    """
    folder = Path(spec.source).expanduser().resolve()
    manifest = read_manifest(folder)
    if destination != folder:
        raise SpecError(
            f"{spec.source}: is sharded already", cure="use it as data.source, or give what its manifest.json names"
        )
    image = manifest.image
    for field, wanted, found in (
        ("size", spec.size or image.height, image.height),
        ("channels", spec.channels, image.channels),
    ):
        if wanted != found:
            raise SpecError(
                f"data.{field}: {wanted} received, and {spec.source} holds shards of {found}",
                cure=f"set data.{field} to {found}, or shard the images anew",
            )
    return manifest


@contextmanager
def _told(destination: Path) -> Iterator[None]:
    """Say of a folder that cannot be written what is the matter."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{destination}: cannot be written: {error.strerror}",
            cure="see who may write there, and what is free; what is finished is kept",
        ) from None


def _same(destination: Path, source: Source) -> Manifest:
    manifest = read_manifest(destination)
    if manifest.fingerprint != source.fingerprint:
        raise ShardError(
            f"{destination}: holds another data set, made of {manifest.name}",
            cure="give an empty folder, or remove this one",
        )
    return manifest


def _write(
    source: Source, destination: Path, missing: Sequence[tuple[int, int, int]], workers: int | None
) -> Iterator[tuple[int, Receipt]]:
    """Write shards, yielding each number and receipt as soon as it is done."""
    if workers == 0 or not missing:
        for number, start, stop in missing:
            yield number, write_shard(source, destination, number, start, stop)
        return
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    shared = ray.put(source)
    waiting = iter(missing)
    running: dict[ray.ObjectRef, int] = {}
    try:
        while True:
            for number, start, stop in islice(waiting, at_once - len(running)):
                running[_write_shard.remote(shared, destination, number, start, stop)] = number
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1, timeout=SILENCE)
            if not ready:
                log.warning("%s: no shard written for %g s; are all CPUs of the cluster taken?", destination, SILENCE)
                continue
            number = running.pop(ready[0])
            try:
                receipt = ray.get(ready[0])
            except RayTaskError as error:
                # Our own errors pass as they are; Ray's wrapper prints a traceback where the message should be.
                raise error.cause if isinstance(error.cause, MongeError | OSError) else error from None
            yield number, receipt
    finally:
        for reference in running:
            ray.cancel(reference)


@ray.remote(num_cpus=1, max_retries=3)
def _write_shard(source: Source, destination: Path, number: int, start: int, stop: int) -> Receipt:
    return write_shard(source, destination, number, start, stop)


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    """Let one job at a time shard a data set, so that the others need not.

    It saves work and no more: two that do it at once write the same bytes, each file in one piece. Hence a lock
    that cannot be had, for want of support by the file system or of progress by its holder, is done without.
    """
    descriptor = os.open(destination / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + PATIENCE
        told = False
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    log.info("%s: another job is sharding this data set; waiting for it", destination)
                    told = True
                time.sleep(0.1)
            except OSError as error:
                log.warning("%s: no lock to be had (%s); going on without", destination, error)
                break
        yield
    finally:
        os.close(descriptor)
