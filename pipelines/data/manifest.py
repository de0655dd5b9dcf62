"""Manifest of a data set: ``manifest.json``, written last, so that its presence implies that of all other files.

::

    manifest.json                classes, shape, shards with their hashes, counts, mean and standard deviation
    index.safetensors            split (n,) uint8 and labels (n,) int64 over all images, in the order of the shards
    shard-00000.safetensors      images (k, c, h, w) uint8, labels (k,) int64, content (k, 16) uint8,
                                 sums (k, c, 2) int64
    quarantine.jsonl             one {"name", "reason"} per image that could not be decoded
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.data.split import SplitName
from pipelines.errors import ShardError
from pipelines.shape import ImageShape

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
QUARANTINE = "quarantine.jsonl"

_HINT = "shard the data set (again): `monge submit` does so by itself"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class FrozenDocument(BaseModel):
    """A frozen document without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(FrozenDocument):
    """Entry of a shard: file, number of images, and sha256 of the file."""

    # The pattern keeps a manifest from pointing outside its folder.
    file: str = Field(pattern=r"^shard-[0-9]{5,}\.safetensors$")
    count: int = Field(ge=1)
    sha256: Sha256


class Manifest(FrozenDocument):
    """A data set of shards.

    Attributes:
        name: name of the source.
        classes: names of the classes, by label.
        image: shape of the images.
        shards: entries of the shards, in order.
        index_sha256: sha256 of the index file.
        counts: number of images by split and class.
        quarantined: number of images that could not be decoded.
        ignored: number of files in the source that are not images.
        mean: mean of each channel over the train split, with pixels in 0 … 1.
        std: standard deviation of each channel over the train split, with pixels in 0 … 1.
        fingerprint: fingerprint of the source and its preparation, :func:`pipelines.data.source.fingerprint`.
    """

    schema_version: Literal[1] = 1
    name: str
    classes: tuple[str, ...] = Field(min_length=1)
    image: ImageShape
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    index_sha256: Sha256
    counts: dict[SplitName, dict[str, Count]]
    quarantined: Count
    ignored: Count
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: Sha256

    @property
    def images(self) -> int:
        """Number of images in all shards."""
        return sum(shard.count for shard in self.shards)

    def document(self) -> bytes:
        """Content of the file."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a data set.

    Raises:
        ShardError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}", hint=_HINT) from None
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Parse a manifest from the bytes of its file.

    Args:
        data: content of the file.
        name: name of the file, for errors.

    Raises:
        ShardError: the manifest is damaged.
    """
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ShardError(f"{name}: not a manifest: {where} {fault['msg']}", hint=_HINT) from None
