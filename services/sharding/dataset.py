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
from pipelines.errors import MongeError, ShardError
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

    A source in S3 is copied to ``home/cache`` first.

    Raises:
        SourceError: there is no such source.
        StorageError: S3 refuses, fails or does not answer.
    """
    copied = local(spec, home / "cache")
    slug = re.sub(r"[^a-z0-9]+", "-", Path(spec.source).stem.lower()).strip("-")[:32]
    return home / "data" / f"{slug or 'images'}-{fingerprint(copied)[:16]}"


def shard_dataset(
    spec: DataSpec,
    destination: Path,
    cache: Path,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> Manifest:
    """Turn a source of images into a data set of shards; shards of an earlier, interrupted call are kept.

    Args:
        spec: the source and its preparation.
        destination: folder of the data set. On a cluster this, the cache and the source lie on a shared file system.
        cache: folder of downloads.
        workers: shards written at a time, by default as many as the cluster has CPUs; 0 to write them in this
            process, without Ray, which must be initialised otherwise.
        on_progress: called with the images done and the images in all, in this process.

    Raises:
        SourceError: the source cannot be found, fetched or trusted.
        StorageError: S3 refuses, fails or does not answer.
        TooManyBadImagesError: more images are unreadable than the spec allows.
        ShardError: the destination holds another data set.
    """
    destination = destination.resolve()
    source = open_source(local(spec, cache), cache)
    total = len(source)
    report = on_progress or (lambda done, total: None)
    destination.mkdir(parents=True, exist_ok=True)
    with _alone(destination):
        if (destination / MANIFEST).exists():
            manifest = _same(destination, source)
            report(total, total)
            return manifest
        spans = chunks(total, source.image)
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
                raise error.cause if isinstance(error.cause, MongeError) else error from None
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
