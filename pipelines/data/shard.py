"""Conversion of sources to shards: each chunk of a source becomes a file, then the driver writes index and manifest.

Every step is deterministic, and every file is written atomically to a :class:`ShardStore`. A job that was killed
resumes where it stopped. Two jobs that build the same data set at the same time write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from pydantic import ValidationError

from pipelines.data.arrays import pack_arrays, unpack_arrays, write_atomically
from pipelines.data.manifest import INDEX, MANIFEST, QUARANTINE, Count, FrozenDocument, Manifest, Sha256, ShardEntry
from pipelines.data.source import Source
from pipelines.data.split import (
    DROPPED,
    SIDES,
    TRAIN,
    drop_repeats,
    drop_test_twins,
    set_apart,
    split_by_content,
)
from pipelines.errors import CorruptImageError, ObjectNotFoundError, ShardError, SourceError, TooManyBadImagesError
from pipelines.shape import ImageShape
from pipelines.spec import DataSpec

SHARD_BYTES = 16 * 2**20
"""Largest size of the pixels of a shard, in bytes."""

SHARD_IMAGES = 1024
"""Images of one shard at most: few enough that even a small data set is the work of several tasks."""

SHARDS = 64
"""Beyond which shards grow rather than become more: a large data set of small images is no heap of small files."""

CONTENT_BYTES = 16
"""Bytes kept of the sha256 of an image; two of 2³² different images agree with probability 2⁻⁶⁵."""

RECEIPTS = ".receipts"
_NAMED = 5


@runtime_checkable
class ShardStore(Protocol):
    """Store of the files of a data set, with atomic writes."""

    def read(self, key: str) -> bytes:
        """Read a file.

        Raises:
            ObjectNotFoundError: the file does not exist.
        """

    def write(self, key: str, data: bytes) -> None:
        """Write a file atomically: readers see the old or the new content."""


@dataclass(frozen=True)
class Folder:
    """A folder as a store; the first write creates it."""

    path: Path

    def read(self, key: str) -> bytes:
        try:
            return (self.path / key).read_bytes()
        except FileNotFoundError:
            raise ObjectNotFoundError(f"{self.path / key}: there is no such file") from None

    def write(self, key: str, data: bytes) -> None:
        write_atomically(self.path / key, data)


class BadImage(FrozenDocument):
    """An image that could not be decoded: its position in the source, its name and the reason."""

    position: Count
    name: str
    reason: str


class Receipt(FrozenDocument):
    """Result of sharding one chunk of a source.

    Attributes:
        fingerprint: fingerprint of the source.
        start, stop: positions of the chunk in the source.
        shard: entry of the file with the readable images; None if no image is readable.
        bad: images that could not be decoded.
    """

    fingerprint: Sha256
    start: Count
    stop: Count
    shard: ShardEntry | None
    bad: tuple[BadImage, ...]


def chunks(n: int, image: ImageShape, shard_bytes: int | None = None) -> list[tuple[int, int]]:
    """Divide the positions 0 … n − 1 of a source into the (start, stop) of its shards.

    Args:
        n: number of images in the source.
        image: shape of the images.
        shard_bytes: largest size of the pixels of a shard; by default at most :data:`SHARD_BYTES`, with images for
            about :data:`SHARDS` shards but at least :data:`SHARD_IMAGES` images per shard.
    """
    many = max(SHARD_IMAGES, math.ceil(n / SHARDS))
    most = min(many, SHARD_BYTES // image.pixels) if shard_bytes is None else shard_bytes // image.pixels
    size = max(1, most)
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def shard_file(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def receipt_file(number: int) -> str:
    """File name of the receipt of a chunk, which exists until the manifest is written."""
    return f"{RECEIPTS}/{number:05d}.safetensors"


def write_shard(source: Source, folder: Path | ShardStore, number: int, start: int, stop: int) -> Receipt:
    """Decode one chunk of a source and write its shard and its receipt.

    Args:
        source: source of the images.
        folder: folder or store of the data set.
        number: index of the shard.
        start, stop: positions of the chunk.

    Raises:
        SourceError: a file cannot be read.
    """
    store = _store(folder)
    # Filled in place: a list of images and a stack of it would need twice the memory.
    images = np.empty((stop - start, *source.image.dims), dtype=np.uint8)
    labels: list[int] = []
    content, sums, bad = [], [], []
    for position in range(start, stop):
        try:
            _, label, pixels = source.item(position)
        except CorruptImageError as error:
            bad.append(BadImage(position=position, name=source.name(position), reason=str(error)))
            continue
        images[len(labels)] = pixels
        labels.append(label)
        content.append(content_hash(pixels))
        sums.append(_sums(pixels))
    entry = None
    columns: dict[str, np.ndarray] = {}
    if labels:
        columns = {
            "labels": np.array(labels, dtype=np.int64),
            "content": np.stack(content),
            "sums": np.stack(sums),
        }
        data = pack_arrays({"images": images[: len(labels)], **columns})
        del images
        store.write(shard_file(number), data)
        entry = ShardEntry(file=shard_file(number), count=len(labels), sha256=hashlib.sha256(data).hexdigest())
    receipt = Receipt(fingerprint=source.fingerprint, start=start, stop=stop, shard=entry, bad=tuple(bad))
    told = np.frombuffer(receipt.model_dump_json().encode(), np.uint8)
    store.write(receipt_file(number), pack_arrays({"receipt": told, **columns}))
    return receipt


def finished(source: Source, folder: Path | ShardStore, number: int, start: int, stop: int) -> Receipt | None:
    """Receipt of a chunk whose shard exists and is intact, else None."""
    store = _store(folder)
    try:
        columns = unpack_arrays(store.read(receipt_file(number)))
        receipt = Receipt.model_validate_json(columns["receipt"].tobytes())
        if (receipt.fingerprint, receipt.start, receipt.stop) != (source.fingerprint, start, stop):
            return None
        if receipt.shard and not is_intact(store, receipt.shard.file, receipt.shard.sha256):
            return None
    except (ObjectNotFoundError, KeyError, ValueError, ValidationError):
        return None
    return receipt


def is_intact(store: ShardStore, file: str, sha256: str) -> bool:
    """Whether a file exists and matches its hash."""
    try:
        return hashlib.sha256(store.read(file)).hexdigest() == sha256
    except ObjectNotFoundError:
        return False


def check_bad(receipts: Sequence[Receipt], total: int, spec: DataSpec) -> None:
    """Require that the fraction of unreadable images is at most ``max_bad_fraction``.

    Args:
        receipts: receipts of the chunks so far.
        total: number of images in the whole source.
        spec: data section of the spec.

    Raises:
        TooManyBadImagesError: the fraction is larger; the message lists the first unreadable images.
    """
    bad = sorted((image for receipt in receipts for image in receipt.bad), key=lambda image: image.position)
    if len(bad) <= spec.max_bad_fraction * total:
        return
    named = "\n".join(f"  {image.name}: {image.reason}" for image in bad[:_NAMED])
    raise TooManyBadImagesError(
        f"{spec.source}: {len(bad)} or more of {total} images cannot be decoded, over data.max_bad_fraction "
        f"{spec.max_bad_fraction:g}; the first:\n{named}",
        hint="repair or remove them, or raise data.max_bad_fraction",
    )


def write_manifest(source: Source, spec: DataSpec, folder: Path | ShardStore, receipts: Sequence[Receipt]) -> Manifest:
    """Split the images, and write the index, the quarantine and, last, the manifest.

    Args:
        source: source of the images.
        spec: data section of the spec.
        folder: folder or store of the data set.
        receipts: receipts of all chunks, in order.

    Raises:
        TooManyBadImagesError: more images are unreadable than the spec allows.
        SourceError: a class has no readable image.
        ShardError: a receipt was removed in the meantime.
    """
    store = _store(folder)
    check_bad(receipts, len(source), spec)
    parts = [(r, _columns(store, number)) for number, r in enumerate(receipts) if r.shard]
    labels = np.concatenate([part["labels"] for _, part in parts])
    sums = np.concatenate([part["sums"] for _, part in parts])
    split = _official(source, [receipt for receipt, _ in parts])
    content = np.concatenate([part["content"] for _, part in parts])
    if split is None:
        split = split_by_content(content, labels, spec.test_fraction)
    elif source.drops_twins:
        split = drop_test_twins(content, split)
    if spec.drop_twins:
        split = drop_repeats(content, split)
    split = set_apart(content, labels, split, spec.validation_fraction)
    per_class = {
        name: np.bincount(labels[split == side], minlength=len(source.classes))
        for name, side in SIDES.items()
        if name != "validation" or spec.validation_fraction
    }
    for name, count in zip(source.classes, per_class["train"], strict=True):
        if not count:
            raise SourceError(f"{spec.source}: class {name!r} has no readable image", hint="repair or remove the class")
    bad = [image for receipt in receipts for image in receipt.bad] + _twins(source, receipts, split)
    lines = [json.dumps({"name": image.name, "reason": image.reason}) + "\n" for image in bad]
    store.write(QUARANTINE, "".join(lines).encode())
    index = pack_arrays({"split": split, "labels": labels})
    store.write(INDEX, index)
    mean, std = _moments(sums[split == TRAIN], source.image)
    manifest = Manifest(
        name=spec.source,
        classes=source.classes,
        image=source.image,
        shards=tuple(receipt.shard for receipt, _ in parts if receipt.shard),
        index_sha256=hashlib.sha256(index).hexdigest(),
        counts={
            side: {name: int(k) for name, k in zip(source.classes, counts, strict=True)}
            for side, counts in per_class.items()
        },
        quarantined=len(bad),
        ignored=source.ignored,
        mean=mean,
        std=std,
        fingerprint=source.fingerprint,
    )
    store.write(MANIFEST, manifest.document())
    return manifest


def content_hash(pixels: np.ndarray) -> np.ndarray:
    """First 16 bytes of the sha256 over shape and pixels of an image, (16,) uint8."""
    state = hashlib.sha256(repr(pixels.shape).encode())
    state.update(np.ascontiguousarray(pixels).data)
    return np.frombuffer(state.digest()[:CONTENT_BYTES], np.uint8)


def _store(folder: Path | ShardStore) -> ShardStore:
    return Folder(folder) if isinstance(folder, Path) else folder


def _sums(pixels: np.ndarray) -> np.ndarray:
    """Sum and sum of squares of each channel of an image, (c, 2): integers, so the order of additions is irrelevant."""
    flat = pixels.reshape(len(pixels), -1)
    squares = np.square(flat, dtype=np.uint16)
    return np.stack([flat.sum(1, dtype=np.int64), squares.sum(1, dtype=np.int64)], axis=1)


def _moments(sums: np.ndarray, image: ImageShape) -> tuple[tuple[float, ...], tuple[float, ...]]:
    count = len(sums) * image.height * image.width
    mean, square = (sums.sum(0).T / count / np.array([[255.0], [255.0**2]])).tolist()
    return tuple(mean), tuple(float(max(s - m * m, 0.0) ** 0.5) for m, s in zip(mean, square, strict=True))


def _columns(store: ShardStore, number: int) -> dict[str, np.ndarray]:
    """Arrays of a shard except the images, from its receipt."""
    try:
        return unpack_arrays(store.read(receipt_file(number)))
    except (ObjectNotFoundError, ValueError) as error:
        raise ShardError(
            f"{receipt_file(number)}: {error.args[0]}", hint="run again: the shard is then written anew"
        ) from None


def _twins(source: Source, receipts: Sequence[Receipt], split: np.ndarray) -> list[BadImage]:
    """Images that were dropped because another image has the same pixels."""
    positions = [
        np.setdiff1d(np.arange(r.start, r.stop), [image.position for image in r.bad]) for r in receipts if r.shard
    ]
    dropped = np.concatenate(positions)[split == DROPPED].tolist()
    return [BadImage(position=i, name=source.name(i), reason="an image that is kept has its pixels") for i in dropped]


def _official(source: Source, receipts: Sequence[Receipt]) -> np.ndarray | None:
    """Split given by the source for the readable images, in the order of the shards."""
    parts = []
    for receipt in receipts:
        split = source.official_split(receipt.start, receipt.stop)
        if split is None:
            return None
        parts.append(np.delete(split, [image.position - receipt.start for image in receipt.bad]))
    return np.concatenate(parts)
