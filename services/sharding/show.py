"""Terminal view of a sharding: progress bar and result."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipelines.data.catalogue import NAMES
from pipelines.data.manifest import QUARANTINE, Manifest
from pipelines.errors import ServiceError, ShardError
from pipelines.spec import DataSpec
from services.cluster import join_cluster, start_cluster
from services.settings import Settings
from services.sharding.dataset import shard_dataset
from services.storage.objects import SCHEME, split_address

_CLASSES_SHOWN = 20

_LENET_SIDE = 12
"""Minimum side of images for LeNet, in pixels."""

_SPEED_SECONDS = 300
"""Seconds over which the rate and the remaining time are averaged."""


def show_sharding(
    spec: DataSpec,
    destination: str,
    settings: Settings,
    console: Console,
    workers: int | None = None,
    shard_bytes: int | None = None,
    restart: bool = False,
) -> Manifest:
    """Shard a source and show the progress; a call after an interruption continues the work.

    Args:
        spec: source and its preparation.
        destination: folder, or ``s3://bucket/prefix``.
        settings: settings of the cluster and of S3.
        console: console for output.
        workers, shard_bytes, restart: see :func:`services.sharding.dataset.shard_dataset`.

    Raises:
        ShardError: the destination is inside the source.
        MongeError: the source, the destination or the cluster fails; finished shards are kept.
    """
    source, target = absolute(spec.source), absolute(destination)
    if source not in NAMES and source != target and f"{target}/".startswith(f"{source}/"):
        raise ShardError(
            f"{destination}: is inside the source {spec.source}",
            hint="use a destination outside the source",
        )
    spec = spec.model_copy(update={"source": source})
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    first: list[int] = []
    started = time.perf_counter()
    with (
        _cluster(settings, workers),
        Progress(*columns, console=console, speed_estimate_period=_SPEED_SECONDS) as bar,
    ):
        task = bar.add_task("reading the source", total=None)

        def on_progress(done: int, total: int) -> None:
            if not first:
                # Images of an earlier call must not count towards the rate of this one.
                first.append(done)
                bar.reset(task, completed=done, total=total, description="images sharded", before=done)
            bar.update(task, completed=done)

        cache = settings.home.absolute() / "cache"
        manifest = shard_dataset(spec, target, cache, workers, on_progress, shard_bytes, restart, verify=True)
    _show(manifest, target, first[0], time.perf_counter() - started, console)
    return manifest


def absolute(address: str) -> str:
    """Return a path as an absolute path; S3 addresses and catalogue names are returned unchanged.

    Raises:
        SpecError: an S3 address is invalid or contains keys.
    """
    if address.startswith(SCHEME):
        split_address(address)
        return address.rstrip("/")
    return address if address in NAMES else str(Path(address).expanduser().resolve())


class _Rate(ProgressColumn):
    """Rate in images per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None and task.elapsed and task.completed > task.fields.get("before", task.completed):
            speed = (task.completed - task.fields["before"]) / task.elapsed  # for a single shard, nothing else is known
        return Text("" if speed is None else f"{speed:,.0f} images/s", style="progress.data.speed")


@contextmanager
def _cluster(settings: Settings, workers: int | None) -> Iterator[None]:
    """Join the platform's cluster if it is running, else start a local one for this call."""
    if workers == 0:
        yield
        return
    try:
        is_known = bool(os.environ.get("RAY_ADDRESS") or settings.address("ray_address"))
    except ServiceError:
        is_known = False
    if is_known:
        join_cluster(settings)
    else:
        start_cluster(settings, workers)
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def _show(manifest: Manifest, target: str, already: int, seconds: float, console: Console) -> None:
    table = Table("class", *manifest.counts)
    for name in manifest.classes[:_CLASSES_SHOWN]:
        table.add_row(name, *(f"{counts[name]:,}" for counts in manifest.counts.values()))
    if len(manifest.classes) > _CLASSES_SHOWN:
        table.add_row(f"and {len(manifest.classes) - _CLASSES_SHOWN} more", *("" for _ in manifest.counts))
    table.add_section()
    table.add_row("all", *(f"{sum(counts.values()):,}" for counts in manifest.counts.values()))
    console.print(table)
    mib = manifest.images * manifest.image.pixels / 2**20
    what = f"{manifest.images:,} images of {manifest.image.dims} in {len(manifest.shards)} shards"
    lines = [f"{what}, {mib:,.1f} MiB of pixels, in {seconds:.1f} s"]
    if already:
        lines.append(f"{already:,} images were already sharded")
    if manifest.quarantined:
        lines.append(f"{manifest.quarantined:,} skipped, listed in {target}/{QUARANTINE}")
    if manifest.ignored:
        lines.append(f"{manifest.ignored:,} other files ignored")
    config = "lenet" if min(manifest.image.height, manifest.image.width) >= _LENET_SIDE else "mlp"
    shape = f"--set data.channels={manifest.image.channels}"
    lines.append(f"train on it with: monge submit configs/{config}.yaml --set data.source={target} {shape}")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
