"""Tar files in the WebDataset layout: members with the same key are one sample.

``0001.jpg`` is the image, and ``0001.cls`` (a number or a name) or ``0001.json`` (an object with a ``label``) has its
class. A tar file is untrusted: nothing is unpacked, links are not followed, and headers and labels have size limits.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipelines.data.decode import MAX_BYTES
from pipelines.data.sources.base import (
    LABEL_NAMES,
    SUFFIXES,
    ArchiveSource,
    first_side,
    part_of,
    prepared,
    read_part,
    shape_of,
    sorted_classes,
    stated_split,
)
from pipelines.errors import SourceError
from pipelines.spec import DataSpec

LABEL_BYTES = 2**16
"""Maximum size of a label file, .cls or .json, in bytes."""

HEADER_BYTES = 2**20
"""Maximum size of a member's header in bytes; tar does not limit long names and extended headers."""


@dataclass(frozen=True)
class TarSource(ArchiveSource):
    """Images in tar files.

    Attributes:
        places: index of the file, offset and size in bytes, for each image.
    """

    places: tuple[tuple[int, int, int], ...]

    def encoded(self, i: int) -> bytes:
        file, offset, size = self.places[i]
        return read_part(self.files[file], offset, min(size, MAX_BYTES + 1))


class _Headers:
    """A file object that limits each read by tarfile to the size of a header."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes, over the limit of {HEADER_BYTES}")
        return self.file.read(count)


def open_tars(spec: DataSpec, root: Path, files: list[str], ignored: int, identity: str) -> TarSource:
    """Open tar files below a folder.

    Args:
        spec: preparation of the images.
        root: folder of the files.
        files: paths of the tar files below it.
        ignored: number of other files.
        identity: sha256 that identifies the files.

    Raises:
        SourceError: if a file is not a tar file, or no file has a labelled image.
    """
    paths = tuple(root / name for name in files)
    names: list[str] = []
    labels: list[str | None] = []
    parts: list[str] = []
    faults: dict[int, str] = {}
    places: list[tuple[int, int, int]] = []
    for number, (path, file) in enumerate(zip(paths, files, strict=True)):
        samples, others = _samples(path)
        ignored += others
        for sample in samples:
            if sample.fault:
                faults[len(names)] = sample.fault
            names.append(f"{file}/{sample.name}")
            labels.append(sample.label)
            parts.append(part_of(file))
            places.append((number, sample.offset, sample.size))
    kept, split = stated_split(parts)
    classes = sorted_classes(labels)
    if not classes:
        raise SourceError(
            f"{root}: no labelled image in {', '.join(files[:3])}",
            hint="WebDataset's layout is wanted: 0001.jpg beside 0001.cls or 0001.json with a label",
        )
    position = {name: label for label, name in enumerate(classes)}
    faulty = {new: faults[old] for new, old in enumerate(kept) if old in faults}
    kept_places = tuple(places[i] for i in kept)

    def images() -> Iterator[tuple[str, bytes]]:
        for i, (file, offset, size) in enumerate(kept_places):
            if i not in faulty:
                yield names[kept[i]], read_part(paths[file], offset, min(size, MAX_BYTES + 1))

    return TarSource(
        classes=classes,
        image=shape_of(spec, spec.size or first_side(root, images(), spec.channels)),
        fingerprint=prepared(spec, identity),
        ignored=ignored + len(names) - len(kept),
        files=paths,
        names=tuple(names[i] for i in kept),
        labels=tuple(-1 if (label := labels[i]) is None else position[label] for i in kept),
        faults=faulty,
        split=split,
        places=kept_places,
    )


@dataclass
class _Sample:
    name: str
    offset: int
    size: int
    label: str | None = None
    fault: str = ""


def _samples(path: Path) -> tuple[list[_Sample], int]:
    """Return the images of a tar file in order, and the number of members that are neither image nor label."""
    samples: list[_Sample] = []
    by_key: dict[str, _Sample] = {}
    told: dict[str, str | None] = {}
    seen: set[str] = set()
    others = 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
            while member := archive.next():
                archive.members = []  # otherwise tarfile keeps every header in memory
                if member.isdir():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key, extension = f"{folder}/{stem}", "." + extension.lower()
                sample = _Sample(member.name, member.offset_data, member.size)
                if extension.endswith(SUFFIXES):
                    samples.append(sample)
                    if not member.isreg() or member.issparse():
                        sample.fault = "not a plain file: links and special files in a tar file are not followed"
                    elif member.name in seen:
                        sample.fault = f"{path.name} holds this name a second time"
                    elif key in by_key:
                        sample.fault = f"a second image of one sample, beside {by_key[key].name}"
                    else:
                        by_key[key] = sample
                elif extension in (".cls", ".json") and member.isreg() and not member.issparse():
                    label = _label(path, member, extension)
                    if key in told and told[key] != label and key in by_key:
                        by_key[key].fault = "its sample has two different labels"
                    told[key] = told.get(key) or label
                else:
                    others += 1
                seen.add(member.name)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise SourceError(
            f"{path}: not a whole tar file: {error}", hint="copy it again; unpack .tar.gz first"
        ) from None
    for key, sample in by_key.items():
        sample.label = told.get(key)
        if sample.label is None and not sample.fault:
            sample.fault = "no readable label: a .cls, or a .json with a field label, of the same name is wanted"
    return samples, others


def _label(path: Path, member: tarfile.TarInfo, extension: str) -> str | None:
    if member.size > LABEL_BYTES:
        return None
    try:
        text = read_part(path, member.offset_data, member.size).decode()
        if extension == ".cls":
            return text.strip() or None
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    values = [found[name] for name in LABEL_NAMES if name in found] if isinstance(found, dict) else []
    value = values[0] if len(values) == 1 else None
    return str(value).strip() or None if isinstance(value, (int, str)) and not isinstance(value, bool) else None
