"""Labels in a CSV or JSONL file next to the images."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipelines.data.sources.base import LABEL_NAMES, read_part
from pipelines.errors import SourceError

TABLE_SUFFIXES = (".csv", ".jsonl")
TABLE_NAMES = ("labels", "metadata")
"""Names, without suffix, of files that are always read as tables of labels."""

TABLE_BYTES = 2**28
"""Maximum size of a table in bytes."""

FILE_NAMES = ("file_name", "filename", "file", "image", "path", "name", "image_id", "id")
"""Names of columns and fields that are read as the file of the image."""


def read_table(path: Path, images: Sequence[str]) -> dict[str, str]:
    """Read the labels of images, by file name.

    Args:
        path: a CSV file with a header, or a JSONL file of objects, in UTF-8. A column or field of :data:`FILE_NAMES`
            has the file's path below the table's folder, or only its name, with or without suffix, if that is unique.
            A column or field of :data:`pipelines.data.sources.base.LABEL_NAMES` has the label.
        images: paths of the image files below the table's folder.

    Raises:
        SourceError: if the table is invalid; the message states the line and the field.
    """
    data = read_part(path, 0, TABLE_BYTES + 1)
    if len(data) > TABLE_BYTES:
        raise SourceError(f"{path}: over the limit of {TABLE_BYTES} bytes", hint="give tar or Parquet files")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(f"{path}, line {line}: not UTF-8", hint="save the table as UTF-8") from None
    # Systems use different Unicode normal forms, so a table and a disk may encode the same name differently.
    known = _names(images)
    labels: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, row in _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text):
        where = f"{path}, line {line}"
        given = _field(where, row, FILE_NAMES, "the file")
        file = unicodedata.normalize("NFC", given.replace("\\", "/").removeprefix("./"))
        image = known.get(file)
        if image is None:
            raise SourceError(
                f"{where}: there is no image {given!r} below {path.parent}",
                hint="give the names of image files below the table's folder, each so that it fits one alone",
            )
        label = _field(where, row, LABEL_NAMES, "the label")
        if image in lines:
            raise SourceError(f"{where}: {given!r} was labelled in line {lines[image]} already", hint="remove one")
        lines[image] = line
        labels[image] = label
    if not labels:
        raise SourceError(f"{path}: no rows in it", hint="give one row for each image")
    return labels


def _names(images: Sequence[str]) -> dict[str, str | None]:
    """Map path, file name and file name without suffix to each image; None if they are ambiguous."""
    known: dict[str, str | None] = {}
    for shorten in (
        str,
        lambda name: name.rpartition("/")[2],
        lambda name: os.path.splitext(name.rpartition("/")[2])[0],
    ):
        found: dict[str, str | None] = {}
        for name in images:
            short = unicodedata.normalize("NFC", shorten(name))
            found[short] = name if found.get(short, name) == name else None
        known = found | known
    return known


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                count = len(reader.fieldnames or ())
                raise SourceError(
                    f"{path}, line {reader.line_num}: not the {count} fields of the header",
                    hint='put quotes around what holds a comma: "a, b"',
                )
            yield reader.line_num, {name.strip(): value for name, value in row.items()}
    except csv.Error as error:
        raise SourceError(f"{path}, line {reader.reader.line_num}: {error}", hint="repair the line") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    # Not splitlines: a line of JSON may contain other Unicode line separators.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}, line {line}: not JSON: {error}", hint="repair the line") from None
        if not isinstance(row, dict):
            raise SourceError(f"{path}, line {line}: not an object", hint='write {"file_name": …, "label": …}')
        yield line, row


def _field(where: str, row: Mapping[str, object], names: Sequence[str], what: str) -> str:
    found = [name for wanted in names for name in row if name.lower() == wanted]
    if not found:
        given = ", ".join(map(repr, row))
        raise SourceError(f"{where}: no field for {what} among {given}", hint=f"name it {names[0]}")
    value = row[found[0]]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise SourceError(
            f"{where}: field {found[0]!r} holds {value!r}", hint=f"{what} is text or a whole number, and not empty"
        )
    return str(value).strip()
