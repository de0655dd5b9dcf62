"""Parquet files with encoded images, in the format of Hugging Face `datasets`.

The files have a column ``image`` of {bytes, path} or of binary, and a column ``label`` of numbers or names; the names
of a ClassLabel are read from the metadata. Only the bytes are read: a path in an untrusted file is never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.data.decode import MAX_BYTES
from pipelines.data.sources.base import (
    LABEL_NAMES,
    ArchiveSource,
    first_side,
    part_of,
    prepared,
    shape_of,
    sorted_classes,
    stated_split,
)
from pipelines.errors import CorruptImageError, SourceError
from pipelines.spec import DataSpec

GROUP_BYTES = 2**30
"""Maximum uncompressed size of a row group; the defaults of writers are at most a tenth of it."""

IMAGE_NAMES = ("image", "img", "images", "jpg", "png")
_HINT = "give a column image of bytes or {bytes, path}, and a column label of whole numbers or text"


@dataclass(frozen=True)
class ParquetSource(ArchiveSource):
    """Images in Parquet files.

    Attributes:
        column: name of the image column.
        places: index of the file, of the row group and of the row, for each image.
    """

    column: str
    places: tuple[tuple[int, int, int], ...]

    def encoded(self, i: int) -> bytes:
        file, group, row = self.places[i]
        return _encoded(_group(self.files[file], group, self.column), row)


def open_parquets(spec: DataSpec, root: Path, files: list[str], ignored: int, identity: str) -> ParquetSource:
    """Open Parquet files below a folder.

    Args:
        spec: preparation of the images.
        root: folder of the files.
        files: paths of the Parquet files below it.
        ignored: number of other files.
        identity: sha256 that identifies the files.

    Raises:
        SourceError: if a file is not a Parquet file, or has no images and labels.
    """
    paths = tuple(root / name for name in files)
    names: list[str] = []
    labels: list[str | None] = []
    parts: list[str] = []
    faults: dict[int, str] = {}
    places: list[tuple[int, int, int]] = []
    column, known = "", None
    for number, (path, file) in enumerate(zip(paths, files, strict=True)):
        columns = _columns(path)
        if number and (columns.image, columns.classes) != (column, known):
            raise SourceError(f"{path}: other columns or classes than {files[0]}", hint="give files of one data set")
        column, known = columns.image, columns.classes
        before = len(names)
        for group, row, value in _labels(path, columns):
            label, fault = _named(value, known)
            if fault:
                faults[len(names)] = fault
            names.append(f"{file}[{len(names) - before}]")
            labels.append(label)
            parts.append(part_of(file))
            places.append((number, group, row))
    kept, split = stated_split(parts)
    classes = known or sorted_classes(labels)
    if not names or not classes:
        raise SourceError(f"{root}: no labelled row in {', '.join(files[:3])}", hint=_HINT)
    position = {name: label for label, name in enumerate(classes)}
    faulty = {new: faults[old] for new, old in enumerate(kept) if old in faults}
    kept_places = tuple(places[i] for i in kept)

    def images() -> Iterator[tuple[str, bytes]]:
        for i, (file, group, row) in enumerate(kept_places):
            try:
                yield names[kept[i]], _encoded(_group(paths[file], group, column), row)
            except CorruptImageError:
                continue

    return ParquetSource(
        classes=classes,
        image=shape_of(spec, spec.size or first_side(root, images(), spec.channels)),
        fingerprint=prepared(spec, identity),
        ignored=ignored + len(names) - len(kept),
        files=paths,
        names=tuple(names[i] for i in kept),
        labels=tuple(-1 if (label := labels[i]) is None else position[label] for i in kept),
        faults=faulty,
        split=split,
        column=column,
        places=kept_places,
    )


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str
    classes: tuple[str, ...] | None


def _opened(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet  # slow to import, and only this kind of source needs it

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"{path}: not a Parquet file: {str(error)[:200]}", hint="copy it again") from None


def _columns(path: Path) -> _Columns:
    import pyarrow.types as types

    schema = _opened(path).schema_arrow

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            position = kind.get_field_index("bytes")
            return position >= 0 and holds_bytes(kind.field(position).type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if holds_bytes(field.type)]
    labels = [
        field.name
        for field in schema
        if field.name in LABEL_NAMES
        and (types.is_integer(field.type) or types.is_string(field.type) or types.is_large_string(field.type))
    ]
    preferred = [name for name in IMAGE_NAMES if name in images]
    images = preferred[:1] or images
    if len(images) != 1 or len(labels) != 1:
        given = ", ".join(f"{field.name}: {field.type}" for field in schema)[:500]
        raise SourceError(f"{path}: no single column of images and of labels among {given}", hint=_HINT)
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        classes = info["info"]["features"][labels[0]]["names"]
        usable = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    except (KeyError, TypeError, ValueError):
        usable = False
    if not usable or len(set(classes)) != len(classes):
        return _Columns(images[0], labels[0], None)
    return _Columns(images[0], labels[0], tuple(classes))


def _labels(path: Path, columns: _Columns) -> Iterator[tuple[int, int, int | str | None]]:
    file = _opened(path)
    for group in range(file.metadata.num_row_groups):
        for row, value in enumerate(_read(path, group, columns.label).to_pylist()):
            yield group, row, value


def _named(value: int | str | None, classes: tuple[str, ...] | None) -> tuple[str | None, str]:
    """Return the class of a label, and the reason if the label is invalid."""
    if value is None or value == "":
        return None, "no label"
    if classes is None:
        return str(value), ""
    if isinstance(value, int) and 0 <= value < len(classes):
        return classes[value], ""
    if value in classes:
        return str(value), ""
    return None, f"label {value!r} is none of the {len(classes)} classes"


@lru_cache(maxsize=1)
def _group(path: Path, group: int, column: str) -> Any:
    # Chunks are read in order, so the next read is usually in the same row group.
    return _read(path, group, column)


def _read(path: Path, group: int, column: str) -> Any:
    import pyarrow

    file = _opened(path)
    try:
        metadata = file.metadata.row_group(group)
        size = sum(
            metadata.column(i).total_uncompressed_size
            for i in range(metadata.num_columns)
            if metadata.column(i).path_in_schema.split(".")[0] == column
        )
    except (pyarrow.ArrowException, ValueError) as error:  # e.g. a damaged column name
        raise _unreadable(path, group, error) from None
    if size > GROUP_BYTES:
        raise SourceError(
            f"{path}: row group {group} has {size} bytes, over the limit of {GROUP_BYTES}",
            hint="write it with smaller row groups",
        )
    try:
        return file.read_row_group(group, columns=[column]).column(0)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, group, error) from None


def _encoded(column: Any, row: int) -> bytes:
    value = column[row].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        raise CorruptImageError("no bytes in it: a path alone is not opened")
    return data[: MAX_BYTES + 1]


def _unreadable(path: Path, group: int, error: Exception) -> SourceError:
    return SourceError(f"{path}: row group {group} cannot be read: {str(error)[:200]}", hint="copy it again")
