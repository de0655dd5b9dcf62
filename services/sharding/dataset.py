"""Sharding of a data set by Ray tasks: one task per shard; the driver writes manifest and index."""

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
"""Seconds that a job waits for another one that is sharding the same data set."""

SILENCE = 30.0
"""Seconds without a finished shard after which a warning is logged."""

_READERS = 4
"""Number of shards in memory that are compared with their hashes concurrently."""


def dataset_address(home: Path, spec: DataSpec, storage: str | None = None) -> str:
    """Return the address of the data set of a spec; a changed source or preparation gets another address.

    The address is ``data/<slug>-<hash>`` in the S3 storage if there is one, else in the home folder. A source in S3 is
    first copied to ``home/cache``. A source that is already sharded, here or in S3, is used directly.

    Raises:
        SourceError: the source does not exist, or its sharding was interrupted.
        StorageError: S3 rejects the request, fails or is unreachable.
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
    """Convert a source of images into a sharded data set; shards of an earlier, interrupted call are kept.

    A source that is already sharded is not changed; the destination must then be the source.

    Args:
        spec: source and its preparation.
        destination: folder of the data set, or ``s3://bucket/prefix``. On a cluster, the folder, the cache and the
            source must be on a shared file system, unless ``MONGE_STORAGE`` is set: then only this machine writes.
        cache: folder for downloads.
        workers: number of shards written concurrently, by default the number of CPUs of the cluster; 0 writes in this
            process, without Ray, which must be initialised otherwise.
        on_progress: called in this process with the number of images done and the total.
        shard_bytes: maximum size of the pixels of a shard in bytes; see :func:`pipelines.data.shard.chunks`.
        restart: whether to delete the files of an earlier call at the destination.
        verify: whether to compare the shards of a finished data set with their hashes, and rewrite damaged ones.

    Raises:
        SourceError: the source is missing, cannot be fetched, or has another hash.
        SpecError: the source is already sharded with another size, channels or options.
        StorageError: the destination cannot be written, or S3 rejects the request, fails or is unreachable.
        TooManyBadImagesError: more images are unreadable than the spec allows.
        ShardError: the destination contains other files, or the source has changed since an interrupted call.
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
            # Another job without the lock finished first and deleted the receipts.
            if not store.exists(MANIFEST):
                raise
            manifest = read_bound(store, source.fingerprint)
            report(len(source), len(source))
        _tidy(store, is_alone)
        return manifest


def is_sharded(spec: DataSpec) -> bool:
    """Return whether a source is a sharded data set; in S3, only such sources are not copied to this machine.

    Raises:
        SourceError: its sharding was interrupted.
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
    """Return the manifest of a source that is already sharded.

    Raises:
        SpecError: the spec requests images of another shape, or shards at another address.
    """
    address = _absolute(spec.source)
    if _absolute(str(destination)) != address:
        raise SpecError(
            f"{spec.source}: is already sharded",
            hint="use it as data.source, or shard the source named in its manifest.json",
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
                f"data.{field}: received {wanted}, but the shards in {spec.source} have {found}",
                hint=f"set data.{field} to {found}, or shard the images again",
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
    """Rewrite the shards of a finished data set that do not match their hashes.

    Raises:
        ShardError: the index is damaged, or a shard cannot be reproduced.
    """
    if not is_intact(store, INDEX, manifest.index_sha256):
        raise ShardError(
            f"{store.address}/{INDEX}: its sha256 does not match the manifest",
            hint="add --restart to shard everything again",
        )
    with ThreadPoolExecutor(_READERS) as pool:
        intact = list(pool.map(lambda entry: is_intact(store, entry.file, entry.sha256), manifest.shards))
    damaged = {entry.file: entry for entry, whole in zip(manifest.shards, intact, strict=True) if not whole}
    spans = chunks(len(source), source.image, shard_bytes)
    missing = [(number, *span) for number, span in enumerate(spans) if shard_file(number) in damaged]
    for name in damaged:
        log.warning("%s/%s: does not match its sha256; rewriting it", store.address, name)
    for number, receipt in _write(source, store, missing, workers):
        if receipt.shard == damaged[shard_file(number)]:
            del damaged[shard_file(number)]
        store.delete(receipt_file(number))
    if damaged:
        raise ShardError(
            f"{store.address}: damaged, and cannot be reproduced from this source with this shard size: "
            f"{', '.join(damaged)}",
            hint="use the original --shard-mib, or --restart to shard everything again",
        )


def _tidy(store: Storage, is_alone: bool) -> None:
    """Remove files that a finished data set does not need, and partial files of killed processes."""
    if isinstance(store, FolderStorage):
        shutil.rmtree(store.root / RECEIPTS, ignore_errors=True)
        if is_alone:
            for left in store.root.glob(".*.tmp"):
                left.unlink(missing_ok=True)
    elif store.exists(PLAN):
        held = [found.key for page in store.pages(f"{RECEIPTS}/") for found in page if found.key != PLAN]
        for key in [*held, PLAN]:  # the plan last: as long as it exists, receipts are searched
            store.delete(key)


def _lock(store: Storage, cache: Path) -> Path:
    """Return the lock file for jobs on one file system that shard the same data set."""
    if isinstance(store, FolderStorage):
        return store.root / LOCK
    return cache / f"{hashlib.sha256(store.address.encode()).hexdigest()[:32]}{LOCK}"


def _write(
    source: Source, store: Storage, missing: Sequence[tuple[int, int, int]], workers: int | None
) -> Iterator[tuple[int, Receipt]]:
    """Write shards, and yield the number and receipt of each when it is finished."""
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
                # Raise errors of Monge directly; Ray's wrapper would print a traceback.
                raise error.cause if isinstance(error.cause, MongeError) else error from None
            yield number, receipt
    finally:
        for reference in running:
            ray.cancel(reference)


def _task() -> tuple[Any, int]:
    """Return the Ray task that writes a shard, with its placement, and the number of available CPUs."""
    if load_settings().storage is None:
        return _write_shard, max(1, int(ray.cluster_resources().get("CPU", 1)))
    here = ray.get_runtime_context().get_node_id()  # other machines cannot read the images
    cpus = sum(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here)
    pinned = NodeAffinitySchedulingStrategy(here, soft=False)
    # Reserve no CPU: other jobs may hold all of this machine for hours.
    return _write_shard.options(scheduling_strategy=pinned, num_cpus=0), cpus


@ray.remote(num_cpus=1, max_retries=3)
def _write_shard(held: list[ray.ObjectRef[Source]], store: Storage, number: int, start: int, stop: int) -> Receipt:
    return write_shard(_source(held[0]), store, number, start, stop)


@lru_cache(maxsize=1)
def _source(reference: ray.ObjectRef[Source]) -> Source:
    """Return the source, once per process: reading a million names from the object store takes a second."""
    return ray.get(reference)


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Let one job at a time shard a data set.

    This only avoids duplicate work: concurrent jobs write the same bytes, and each file atomically. Therefore a lock
    that cannot be acquired, because the file system does not support it or its holder makes no progress, is skipped;
    the value tells whether it was acquired.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"{lock.parent}: cannot be written: {error.strerror}", hint="check permissions and free space"
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
                log.warning("%s: cannot acquire a lock (%s); continuing without", lock.parent, error)
                break
        yield is_alone
    finally:
        os.close(descriptor)
