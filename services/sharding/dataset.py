"""A data set sharded by Ray tasks: one task for each shard, all that binds them in the driver."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.data.manifest import INDEX, MANIFEST, Manifest, parse_manifest
from pipelines.data.shard import (
    RECEIPTS,
    Receipt,
    check_bad,
    chunks,
    finished,
    is_intact,
    receipt_file,
    shard_file,
    write_manifest,
    write_shard,
)
from pipelines.data.source import Source, fingerprint, open_source
from pipelines.errors import MongeError, ShardError, SpecError, StorageError
from pipelines.spec import DataSpec
from services.settings import load_settings
from services.sharding.destination import (
    PLAN,
    check_ours,
    discard,
    half_done,
    read_bound,
    read_sharding_plan,
    sharding_plan,
)
from services.sharding.fetch import local
from services.storage.local import FolderStorage
from services.storage.objects import SCHEME, Storage
from services.storage.open import open_storage
from services.terminal import OnProgress

log = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE = 600.0
"""Seconds that a job leaves the work to another one that is sharding the same data set."""

SILENCE = 30.0
"""Seconds without a finished shard after which the log says so."""

_READERS = 4
"""Shards compared with their hashes at a time, each of them in memory."""


def dataset_address(home: Path, spec: DataSpec, storage: str | None = None) -> str:
    """Where the data set of a spec lies, or will: a changed source or preparation gets another place.

    That place is ``data/<slug>-<hash>`` below the storage in S3, where there is one, else below the home. A source in
    S3 is copied to ``home/cache`` first. One that is already sharded, here or in S3, is its own data set.

    Raises:
        SourceError: there is no such source, or its sharding was not finished.
        StorageError: S3 refuses, fails or does not answer.
    """
    copied = local(spec, home / "cache")
    if is_sharded(copied):
        return _absolute(copied.source)
    slug = re.sub(r"[^a-z0-9]+", "-", Path(spec.source).stem.lower()).strip("-")[:32]
    name = f"{slug or 'images'}-{fingerprint(copied)[:16]}"
    return f"{storage}/data/{name}" if storage else str((home / "data" / name).absolute())


def shard_dataset(
    spec: DataSpec,
    destination: Path | str,
    cache: Path,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    shard_bytes: int | None = None,
    restart: bool = False,
    verify: bool = False,
) -> Manifest:
    """Turn a source of images into a data set of shards; shards of an earlier, interrupted call are kept.

    A source that is such a data set itself, and the destination, is left as it is.

    Args:
        spec: the source and its preparation.
        destination: folder of the data set, or ``s3://bucket/prefix``. On a cluster the folder, the cache and the
            source lie on a shared file system, unless ``MONGE_STORAGE`` is set: this machine alone writes then.
        cache: folder of downloads.
        workers: shards written at a time, by default as many as the cluster has CPUs; 0 to write them in this
            process, without Ray, which must be initialised otherwise.
        on_progress: called with the images done and the images in all, in this process.
        shard_bytes: pixels of one shard at most; see :func:`pipelines.data.shard.chunks`.
        restart: discard what an earlier call left at the destination.
        verify: compare the shards of a finished data set with their hashes, and write damaged ones anew.

    Raises:
        SourceError: the source cannot be found, fetched or trusted.
        SpecError: the source is already sharded, and for other images.
        StorageError: the destination cannot be written, or S3 refuses, fails or does not answer.
        TooManyBadImagesError: more images are unreadable than the spec allows.
        ShardError: the destination holds something else, or the source has changed since a call that was interrupted.
    """
    report = on_progress or (lambda done, total: None)
    copied = local(spec, cache)
    if is_sharded(copied):
        manifest = taken_as_it_is(copied, destination)
        report(manifest.images, manifest.images)
        return manifest
    store = open_storage(str(destination), load_settings())
    source = open_source(copied, cache)
    with _alone(_lock(store, cache)) as is_alone:
        check_ours(store)
        if restart:
            discard(store)
        elif store.exists(MANIFEST):
            manifest = read_bound(store, source.fingerprint)
            if verify:
                _repair(source, store, manifest, shard_bytes, workers)
            _tidy(store, is_alone)
            report(len(source), len(source))
            return manifest
        try:
            manifest = _shard(source, spec, store, workers, report, shard_bytes)
        except (ShardError, StorageError):
            # Another job that could do without the lock was done first, and took the receipts away from under this one.
            if not store.exists(MANIFEST):
                raise
            manifest = read_bound(store, source.fingerprint)
            report(len(source), len(source))
        _tidy(store, is_alone)
        return manifest


def is_sharded(spec: DataSpec) -> bool:
    """Whether a source is a data set of shards: of those in S3, only such ones are not copied to this machine.

    Raises:
        SourceError: it is one that is not finished.
    """
    if spec.source.startswith(SCHEME):
        return True
    folder = Path(spec.source).expanduser()
    if (folder / MANIFEST).is_file():
        return True
    if (folder / RECEIPTS).is_dir():
        raise half_done(spec.source)
    return False


def taken_as_it_is(spec: DataSpec, destination: Path | str) -> Manifest:
    """The manifest of a source that is already sharded.

    Raises:
        SpecError: the spec asks for images of another shape, or for shards elsewhere.
    """
    address = _absolute(spec.source)
    if _absolute(str(destination)) != address:
        raise SpecError(
            f"{spec.source}: is already sharded", hint="use it as data.source, or give what its manifest.json names"
        )
    store = open_storage(address, load_settings())
    manifest = parse_manifest(store.read(MANIFEST), f"{address}/{MANIFEST}")
    image = manifest.image
    for field, wanted, found in (
        ("size", spec.size or image.height, image.height),
        ("channels", spec.channels, image.channels),
    ):
        if wanted != found:
            raise SpecError(
                f"data.{field}: {wanted} received, and {spec.source} holds shards of {found}",
                hint=f"set data.{field} to {found}, or shard the images anew",
            )
    return manifest


def _absolute(address: str) -> str:
    return address.rstrip("/") if address.startswith(SCHEME) else str(Path(address).expanduser().resolve())


def _shard(
    source: Source, spec: DataSpec, store: Storage, workers: int | None, report: OnProgress, shard_bytes: int | None
) -> Manifest:
    plan = sharding_plan(source, spec, shard_bytes)
    begun = read_sharding_plan(store)
    if begun is None:
        store.write(PLAN, plan.document())
    else:
        begun.check(plan, store.address)
    total = len(source)
    spans = chunks(total, source.image, shard_bytes)
    receipts = _finished(source, store, spans) if begun else {}
    missing = [(number, *span) for number, span in enumerate(spans) if number not in receipts]
    done = sum(receipt.stop - receipt.start for receipt in receipts.values())
    report(done, total)
    for number, receipt in _write(source, store, missing, workers):
        receipts[number] = receipt
        done += receipt.stop - receipt.start
        check_bad(list(receipts.values()), total, spec)
        report(done, total)
    return write_manifest(source, spec, store, [receipts[number] for number in range(len(spans))])


def _finished(source: Source, store: Storage, spans: Sequence[tuple[int, int]]) -> dict[int, Receipt]:
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda at: finished(source, store, at[0], *at[1]), enumerate(spans))
        return {number: receipt for number, receipt in enumerate(found) if receipt}


def _repair(source: Source, store: Storage, manifest: Manifest, shard_bytes: int | None, workers: int | None) -> None:
    """Write those shards of a finished data set anew that do not match their hashes.

    Raises:
        ShardError: the index is damaged, or a shard cannot become what it was.
    """
    if not is_intact(store, INDEX, manifest.index_sha256):
        raise ShardError(
            f"{store.address}/{INDEX}: its sha256 is not the manifest's", hint="give --restart to shard everything anew"
        )
    with ThreadPoolExecutor(_READERS) as pool:
        intact = list(pool.map(lambda entry: is_intact(store, entry.file, entry.sha256), manifest.shards))
    damaged = {entry.file: entry for entry, whole in zip(manifest.shards, intact, strict=True) if not whole}
    spans = chunks(len(source), source.image, shard_bytes)
    missing = [(number, *span) for number, span in enumerate(spans) if shard_file(number) in damaged]
    for name in damaged:
        log.warning("%s/%s: does not match its sha256; it is written anew", store.address, name)
    for number, receipt in _write(source, store, missing, workers):
        if receipt.shard == damaged[shard_file(number)]:
            del damaged[shard_file(number)]
        store.delete(receipt_file(number))
    if damaged:
        raise ShardError(
            f"{store.address}: damaged, and not to be had again from this source in this size of shards: "
            f"{', '.join(damaged)}",
            hint="give the --shard-mib it was made with; or --restart, to shard everything anew",
        )


def _tidy(store: Storage, is_alone: bool) -> None:
    """Remove what a finished data set no longer needs, and what a process left that was killed as it wrote."""
    if isinstance(store, FolderStorage):
        shutil.rmtree(store.root / RECEIPTS, ignore_errors=True)
        if is_alone:
            for left in store.root.glob(".*.tmp"):
                left.unlink(missing_ok=True)
    elif store.exists(PLAN):
        held = [found.key for page in store.pages(f"{RECEIPTS}/") for found in page if found.key != PLAN]
        for key in [*held, PLAN]:  # the plan last: while it is there, the others are looked for
            store.delete(key)


def _lock(store: Storage, cache: Path) -> Path:
    """The file by which jobs on one file system find out that they are about to do the same."""
    if isinstance(store, FolderStorage):
        return store.root / LOCK
    return cache / f"{hashlib.sha256(store.address.encode()).hexdigest()[:32]}{LOCK}"


def _write(
    source: Source, store: Storage, missing: Sequence[tuple[int, int, int]], workers: int | None
) -> Iterator[tuple[int, Receipt]]:
    """Write shards, yielding each number and receipt as soon as it is done."""
    if workers == 0 or not missing:
        for number, start, stop in missing:
            yield number, write_shard(source, store, number, start, stop)
        return
    task, cpus = _task()
    if not cpus:
        yield from _write(source, store, missing, 0)
        return
    at_once = workers or cpus
    shared = ray.put(source)
    waiting = iter(missing)
    running: dict[ray.ObjectRef[Any], int] = {}
    try:
        while True:
            for number, start, stop in islice(waiting, at_once - len(running)):
                running[task.remote([shared], store, number, start, stop)] = number
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1, timeout=SILENCE)
            if not ready:
                log.warning("%s: no shard written for %g s; are all CPUs of the cluster taken?", store.address, SILENCE)
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


def _task() -> tuple[Any, int]:
    """The Ray task that writes a shard where it may run, and the CPUs that there are for it."""
    if load_settings().storage is None:
        return _write_shard, max(1, int(ray.cluster_resources().get("CPU", 1)))
    here = ray.get_runtime_context().get_node_id()  # other machines do not see the images
    cpus = sum(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here)
    pinned = NodeAffinitySchedulingStrategy(here, soft=False)
    # Without a CPU of their own: other jobs may hold all of this machine for hours.
    return _write_shard.options(scheduling_strategy=pinned, num_cpus=0), cpus


@ray.remote(num_cpus=1, max_retries=3)
def _write_shard(held: list[ray.ObjectRef[Source]], store: Storage, number: int, start: int, stop: int) -> Receipt:
    return write_shard(_source(held[0]), store, number, start, stop)


@lru_cache(maxsize=1)
def _source(reference: ray.ObjectRef[Source]) -> Source:
    """A source with a million names takes a second to be read from the object store: once in each process."""
    return ray.get(reference)


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Let one job at a time shard a data set, so that the others need not.

    It saves work and no more: two that do it at once write the same bytes, each file in one piece. Hence a lock
    that cannot be had, for want of support by the file system or of progress by its holder, is done without; the
    value says whether it was had.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"{lock.parent}: cannot be written: {error.strerror}", hint="see who may write there, and what is free"
        ) from None
    is_alone = False
    try:
        deadline = time.monotonic() + PATIENCE
        told = False
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_alone = True
                break
            except BlockingIOError:
                if not told:
                    log.info("%s: another job is sharding this data set; waiting for it", lock.parent)
                    told = True
                time.sleep(0.1)
            except OSError as error:
                log.warning("%s: no lock to be had (%s); going on without", lock.parent, error)
                break
        yield is_alone
    finally:
        os.close(descriptor)
