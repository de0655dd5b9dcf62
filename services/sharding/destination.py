"""State of the destination of a sharding: empty, a part of the same sharding, or other files."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import ValidationError

from pipelines.data.manifest import INDEX, MANIFEST, QUARANTINE, FrozenDocument, Manifest, Sha256, parse_manifest
from pipelines.data.shard import RECEIPTS
from pipelines.data.source import Source
from pipelines.errors import ObjectNotFoundError, ShardError, SourceError
from pipelines.spec import DataSpec
from services.storage.objects import Storage

PLAN = f"{RECEIPTS}/plan.json"
"""Written first: describes the data set that the other files belong to."""

_OURS = re.compile("|".join([r"shard-[0-9]{5,}\.safetensors", *map(re.escape, (MANIFEST, INDEX, QUARANTINE))]))


class ShardingPlan(FrozenDocument):
    """Parameters of a sharding: source, preparation, size of shards, and fingerprint."""

    source: str
    size: int
    channels: int
    test_fraction: float
    validation_fraction: float
    drop_twins: bool
    shard_bytes: int | None
    fingerprint: Sha256

    def document(self) -> bytes:
        """Return the content of the file."""
        return (self.model_dump_json() + "\n").encode()

    def check(self, other: ShardingPlan, address: str) -> None:
        """Raise if another plan differs from this one.

        Raises:
            ShardError: the plans differ; the message names the fields.
        """
        if self.fingerprint == other.fingerprint and self.shard_bytes == other.shard_bytes:
            return  # a copy of the source, such as one fetched from S3, is equivalent
        asked = other.model_dump()
        differing = [
            f"{name} {begun}, now {asked[name]}"
            for name, begun in self.model_dump(exclude={"fingerprint"}).items()
            if begun != asked[name]
        ]
        what = "; ".join(differing) if differing else f"{self.source} has changed since"
        raise ShardError(
            f"{address}: contains part of another sharding: {what}",
            hint="use the original options, another destination, or --restart to delete it",
        )


def sharding_plan(source: Source, spec: DataSpec, shard_bytes: int | None) -> ShardingPlan:
    """Return the plan of a requested sharding."""
    return ShardingPlan(
        source=spec.source,
        size=source.image.height,
        channels=source.image.channels,
        test_fraction=spec.test_fraction,
        validation_fraction=spec.validation_fraction,
        drop_twins=spec.drop_twins,
        shard_bytes=shard_bytes,
        fingerprint=source.fingerprint,
    )


def read_sharding_plan(store: Storage) -> ShardingPlan | None:
    """Return the plan of an interrupted sharding; None if there is none.

    Raises:
        ShardError: the plan is damaged.
    """
    try:
        return ShardingPlan.model_validate_json(store.read(PLAN))
    except ObjectNotFoundError:
        return None
    except ValidationError:
        raise ShardError(
            f"{store.address}/{PLAN}: not the plan of a sharding", hint="add --restart to delete the existing files"
        ) from None


def check_ours(store: Storage) -> None:
    """Raise if a destination contains files that were not written by a sharding.

    Raises:
        ShardError: such a file exists; the message names it.
        StorageError: the destination cannot be listed.
    """
    for key in _visible(store):
        if not _OURS.fullmatch(key):
            raise ShardError(
                f"{store.address}: contains other files, such as {key}",
                hint="use a destination that is empty or does not exist",
            )


def read_bound(store: Storage, fingerprint: str) -> Manifest:
    """Return the manifest of a finished data set.

    Raises:
        ShardError: the manifest is damaged, or belongs to another source or preparation.
    """
    manifest = parse_manifest(store.read(MANIFEST), f"{store.address}/{MANIFEST}")
    if manifest.fingerprint != fingerprint:
        raise ShardError(
            f"{store.address}: contains another data set, made from an earlier {manifest.name}, "
            f"{manifest.image.height} pixels wide, in {manifest.image.channels} channels",
            hint="use another destination, or --restart to delete it",
        )
    return manifest


def half_done(source: str) -> SourceError:
    """Return the error for a source whose sharding was interrupted."""
    return SourceError(
        f"{source}: an unfinished sharded data set",
        hint="run the same `monge shard` again: it continues where it stopped",
    )


def discard(store: Storage) -> None:
    """Delete a sharding: the manifest first, so that the rest never counts as complete, and the plan last."""
    receipts = [found.key for page in store.pages(f"{RECEIPTS}/") for found in page if found.key != PLAN]
    for key in (MANIFEST, *list(_visible(store)), *receipts, PLAN):
        store.delete(key)


def _visible(store: Storage) -> Iterator[str]:
    try:
        yield from (found.key for page in store.pages() for found in page if not found.key.startswith(f"{RECEIPTS}/"))
    except ObjectNotFoundError:  # a folder that does not exist yet
        return
