"""Base classes and functions of all sources of images."""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipelines.data.decode import MAX_BYTES, decode, shorter_side
from pipelines.data.split import TEST, TRAIN
from pipelines.errors import CorruptImageError, SourceError
from pipelines.shape import ImageShape
from pipelines.spec import DataSpec

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SIDES = (4, 1024)
"""Minimum and maximum side of the square images, as in :class:`~pipelines.spec.DataSpec`."""

LABEL_NAMES = ("label", "labels", "class", "category", "cls")
"""Names of columns and fields that are read as the label."""

_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "testing")
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_LEFT_BEHIND = ("__MACOSX", "@eaDir", "lost+found")
_WORDS = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Source(ABC):
    """Labelled images, not yet decoded.

    Attributes:
        classes: names of the classes, by label.
        image: shape of the decoded images.
        fingerprint: sha256 that identifies the images and their preparation, see
            :func:`pipelines.data.source.fingerprint`.
        ignored: number of other files, which are ignored.
    """

    classes: tuple[str, ...]
    image: ImageShape
    fingerprint: str
    ignored: int

    drops_twins: ClassVar[bool] = True
    """Whether to drop training images with the same pixels as a test image, if the source defines the split."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, damaged ones included."""

    @abstractmethod
    def item(self, i: int) -> tuple[str, int, np.ndarray]:
        """Return name, label and (c, h, w) uint8 pixels of an image.

        Raises:
            CorruptImageError: if the image cannot be decoded, or has no label.
            SourceError: if the image cannot be read.
        """

    @abstractmethod
    def name(self, i: int) -> str:
        """Return the name of an image: its path below the source's folder, or its number."""

    def official_split(self, start: int, stop: int) -> np.ndarray | None:
        """Return the source's split of images ``start … stop − 1``: 0 for train, 1 for test; None without a split."""
        return None


@dataclass(frozen=True)
class ArchiveSource(Source):
    """Encoded images in archives.

    Attributes:
        files: paths of the archives.
        names: names of the images.
        labels: labels of the images; −1 for an image without label.
        faults: reasons why images cannot be used, by position.
        split: 0 for train, 1 for test; None if the source has no split.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    faults: dict[int, str]
    split: tuple[int, ...] | None

    @abstractmethod
    def encoded(self, i: int) -> bytes:
        """Return the encoded bytes of an image."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def item(self, i: int) -> tuple[str, int, np.ndarray]:
        if i in self.faults:
            raise CorruptImageError(self.faults[i])
        pixels = decode(self.encoded(i), self.image.height, self.image.channels)
        return self.names[i], self.labels[i], pixels

    def official_split(self, start: int, stop: int) -> np.ndarray | None:
        return None if self.split is None else np.array(self.split[start:stop], dtype=np.uint8)


def prepared(spec: DataSpec, identity: str) -> str:
    """Compute the sha256 of a source's identity and of the preparation of its images."""
    # A run that trains on some of the images reads them from the shards of all images.
    # The identity of a composed source includes the section of its spec.
    excluded = {"source", "max_bad_fraction", "per_class", "characters"}
    decisive = spec.model_dump(mode="json", exclude=excluded) | {"identity": identity}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def identity_of(root: Path, files: Sequence[str]) -> str:
    """Compute the sha256 of the names, sizes and modification times of files below a root."""
    state = hashlib.sha256(f"{root}\n".encode(errors="surrogateescape"))
    for name in files:
        status = (root / name).stat()
        state.update(os.fsencode(name) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return state.hexdigest()


def visible_files(folder: Path) -> Iterator[str]:
    """Iterate over the paths of the files below a folder in a fixed order, without hidden files and folders."""
    for current, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (os.path.join(current, name) for name in sorted(names) if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether to ignore a file or folder: its name starts with a dot, or is that of a system file."""
    return name.startswith(".") or name in _LEFT_BEHIND


def sorted_classes(labels: Sequence[str | None]) -> tuple[str, ...]:
    """Return the distinct labels, sorted by value if all are integers, else by text."""
    found = {label for label in labels if label is not None}
    if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in found):
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    return tuple(sorted(found))


def part_of(path: str) -> str:
    """Return the split named by a word of a path: ``train``, ``test``, ``validation`` or an empty string."""
    for part in path.lower().split("/"):
        words = _WORDS.findall(part)
        for name, known in (("train", _TRAIN_NAMES), ("test", _TEST_NAMES), ("validation", _VALIDATION_NAMES)):
            if any(word in known for word in words):
                return name
    return ""


def is_part(folder: str) -> bool:
    """Whether the name of a folder is the name of a split."""
    return folder.lower() in _TRAIN_NAMES + _TEST_NAMES + _VALIDATION_NAMES


def stated_split(parts: Sequence[str]) -> tuple[list[int], tuple[int, ...] | None]:
    """Select the images to keep, and their split.

    Without a test split, the validation images are the test images; with a test split, they are dropped. A source that
    does not name a split for all of its images, or names only one side, has no split.

    Args:
        parts: split of each image, see :func:`part_of`.

    Returns:
        Positions of the images to keep, and their split: 0 for train, 1 for test; None if there is no split.
    """
    named = set(parts)
    if "" in named or "train" not in named or len(named) == 1:
        return list(range(len(parts))), None
    held_out = "test" if "test" in named else "validation"
    kept = [i for i, part in enumerate(parts) if part in ("train", held_out)]
    return kept, tuple(TEST if parts[i] == held_out else TRAIN for i in kept)


def shape_of(spec: DataSpec, side: int) -> ImageShape:
    """Return the shape of the prepared images.

    Raises:
        SourceError: if the side is not within :data:`SIDES`.
    """
    least, greatest = SIDES
    if not least <= side <= greatest:
        raise SourceError(
            f"{spec.source}: its images are {side} pixels wide or high", hint=f"set data.size, {least} to {greatest}"
        )
    return ImageShape(spec.channels, side, side)


def first_side(root: Path, images: Iterator[tuple[str, bytes]], channels: int) -> int:
    """Return the shorter side of the first image that can be decoded: the default size of a source's images.

    Raises:
        SourceError: if no image can be decoded.
    """
    reason, count = "there are none", 0
    for name, data in images:
        count += 1
        try:
            side = shorter_side(data)
            decode(data, side, channels)
        except CorruptImageError as error:
            reason = f"{name}: {error}"
        else:
            return side
    raise SourceError(f"{root}: none of {count} images can be decoded; the last: {reason}")


def read_image(path: Path) -> bytes:
    """Read an image file, up to one byte more than the decoder's limit.

    Raises:
        SourceError: if the file cannot be read.
    """
    return read_part(path, 0, MAX_BYTES + 1)


def read_part(path: Path, start: int, count: int) -> bytes:
    """Read a range of bytes of a file.

    Raises:
        SourceError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read: {error.strerror}", hint="leave the folder as it is until the job has read it"
        ) from None
