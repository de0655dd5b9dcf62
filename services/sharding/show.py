"""A sharding on a terminal: a bar while it runs, then what came out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipelines.data.manifest import QUARANTINE, Manifest
from pipelines.spec import DataSpec
from services.cluster import join_cluster
from services.settings import Settings
from services.sharding.fetch import SCHEME
from services.sharding.publish import shard_to
from services.storage.objects import split_address


def show_sharding(
    spec: DataSpec, destination: str, settings: Settings, workers: int | None, shard_mib: int | None, console: Console
) -> Manifest:
    """Shard a source, and show it.

    Args:
        spec: the source and its preparation.
        destination: a folder, or ``s3://bucket/prefix``.
        settings: where everything is.
        workers: Ray tasks at a time; 0 to do without a cluster.
        shard_mib: pixels of a shard at most.
        console: where to show it.

    Raises:
        MongeError: of the source, of the destination, or of the cluster.
    """
    if spec.source.startswith(SCHEME):
        split_address(spec.source)
    elif (path := Path(spec.source).expanduser()).exists():
        spec = spec.model_copy(update={"source": str(path.absolute())})
    if workers != 0:
        join_cluster(settings)
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        images = progress.add_task("images sharded", total=None)
        files = progress.add_task("files in S3", total=None, visible=destination.startswith(SCHEME))

        def on(bar: object) -> Callable[[int, int], None]:
            return lambda done, total: progress.update(bar, completed=done, total=total)  # type: ignore[arg-type]

        shard_bytes = None if shard_mib is None else shard_mib * 2**20
        manifest = shard_to(spec, destination, settings, workers, shard_bytes, on(images), on(files))
    splits = list(manifest.counts)
    table = Table("class", *splits)
    for name in manifest.classes:
        table.add_row(name, *(f"{manifest.counts[split][name]:,}" for split in splits))
    console.print(table)
    lines = [f"{manifest.images:,} images of {manifest.image.dims} in {len(manifest.shards)} shards"]
    if manifest.quarantined:
        lines.append(f"{manifest.quarantined:,} set aside, listed in {destination}/{QUARANTINE}")
    if manifest.ignored:
        lines.append(f"{manifest.ignored:,} other files passed over")
    shape = f"--set data.channels={manifest.image.channels}"
    lines.append(f"train on it with: monge submit configs/lenet.yaml --set data.source={destination} {shape}")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    return manifest


class _Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="progress.data.speed")
