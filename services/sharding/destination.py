"""What lies at the destination of a sharding: nothing, a part of the same one, or something to keep away from."""

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
"""Written first: what the files beside it are to become."""

_OURS = re.compile("|".join([r"shard-[0-9]{5,}\.safetensors", *map(re.escape, (MANIFEST, INDEX, QUARANTINE))]))


class ShardingPlan(FrozenDocument):
    """What a sharding began with: the source, its preparation, the size of its shards, and its fingerprint."""

    source: str
    size: int
    channels: int
    test_fraction: float
    validation_fraction: float
    drop_twins: bool
    shard_bytes: int | None
    fingerprint: Sha256

    def document(self) -> bytes:
        """What the file holds."""
        return (self.model_dump_json() + "\n").encode()

    def check(self, other: ShardingPlan, address: str) -> None:
        """Refuse to go on with another plan than this one.

        Raises:
            ShardError: saying what differs.
        """
        if self.fingerprint == other.fingerprint and self.shard_bytes == other.shard_bytes:
            return  # a copy of the source elsewhere, as fetched from S3, is the source
        asked = other.model_dump()
        differing = [
            f"{name} {begun}, now {asked[name]}"
            for name, begun in self.model_dump(exclude={"fingerprint"}).items()
            if begun != asked[name]
        ]
        what = "; ".join(differing) if differing else f"{self.source} has changed since"
        raise ShardError(
            f"{address}: holds part of another sharding: {what}",
            hint="give the options it began with, or --restart to discard what is there, or another destination",
        )


def sharding_plan(source: Source, spec: DataSpec, shard_bytes: int | None) -> ShardingPlan:
    """The plan of a sharding that is asked for."""
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
    """The plan that an interrupted sharding began with; None where there is none.

    Raises:
        ShardError: it is damaged.
    """
    try:
        return ShardingPlan.model_validate_json(store.read(PLAN))
    except ObjectNotFoundError:
        return None
    except ValidationError:
        raise ShardError(
            f"{store.address}/{PLAN}: not the plan of a sharding", hint="give --restart to discard what is there"
        ) from None


def check_ours(store: Storage) -> None:
    """Refuse a destination in which there is anything that no sharding wrote.

    Raises:
        ShardError: naming it.
        StorageError: the destination cannot be listed.
    """
    for key in _visible(store):
        if not _OURS.fullmatch(key):
            raise ShardError(
                f"{store.address}: holds something else, as {key}; nothing is written beside it",
                hint="give a destination that is empty or does not exist",
            )


def read_bound(store: Storage, fingerprint: str) -> Manifest:
    """The manifest of a finished data set.

    Raises:
        ShardError: it is damaged, or of another source or preparation.
    """
    manifest = parse_manifest(store.read(MANIFEST), f"{store.address}/{MANIFEST}")
    if manifest.fingerprint != fingerprint:
        raise ShardError(
            f"{store.address}: holds another data set, made of {manifest.name} as it was then and "
            f"{manifest.image.height} pixels wide, in {manifest.image.channels} channels",
            hint="give another destination, or --restart to discard what is there",
        )
    return manifest


def half_done(source: str) -> SourceError:
    """The error of a source whose sharding was not finished."""
    return SourceError(
        f"{source}: a data set of shards that is not finished",
        hint="start the `monge shard` that was interrupted again: it goes on where it stopped",
    )


def discard(store: Storage) -> None:
    """Remove what a sharding left; the manifest first, so that what remains is never taken for whole, the plan last."""
    receipts = [found.key for page in store.pages(f"{RECEIPTS}/") for found in page if found.key != PLAN]
    for key in (MANIFEST, *list(_visible(store)), *receipts, PLAN):
        store.delete(key)


def _visible(store: Storage) -> Iterator[str]:
    try:
        yield from (found.key for page in store.pages() for found in page if not found.key.startswith(f"{RECEIPTS}/"))
    except ObjectNotFoundError:  # a folder that does not exist yet
        return
