"""Log entries of a run; a checkpoint stores those that MLflow has not received."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import CheckpointError

UNSENT = "unsent.json"
"""Name of the file in a checkpoint."""


@dataclass(frozen=True)
class Point:
    """A point of a metric."""

    name: str
    value: float
    images: int
    milliseconds: int


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of a series: (h, w) or (h, w, c) uint8."""

    name: str
    pixels: np.ndarray
    images: int
    milliseconds: int


@dataclass(frozen=True, eq=False)
class File:
    """An artifact."""

    path: str
    content: bytes


@dataclass(frozen=True)
class Tag:
    """A tag of the run."""

    name: str
    value: str


LogEntry = Point | Picture | File | Tag


def write_entries(entries: Sequence[LogEntry], folder: Path) -> None:
    """Write entries to the folder of a checkpoint."""
    (folder / UNSENT).write_text(json.dumps([_document(entry) for entry in entries]) + "\n")


def read_entries(folder: Path) -> list[LogEntry]:
    """Return the entries in a checkpoint; empty if it has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / UNSENT
    if not path.exists():
        return []
    try:
        return [_entry(**document) for document in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _document(entry: LogEntry) -> dict[str, Any]:
    match entry:
        case Picture(name, pixels, images, milliseconds):
            content = base64.b64encode(pixels.tobytes()).decode()
            held = {"name": name, "images": images, "milliseconds": milliseconds}
            return {"kind": "picture", "shape": pixels.shape, "content": content} | held
        case File(path, content):
            return {"kind": "file", "path": path, "content": base64.b64encode(content).decode()}
        case Point(name, value, images, milliseconds):
            return {"kind": "point", "name": name, "value": value, "images": images, "milliseconds": milliseconds}
        case Tag(name, value):
            return {"kind": "tag", "name": name, "value": value}


def _entry(kind: str, **held: Any) -> LogEntry:
    match kind:
        case "picture":
            content = base64.b64decode(held.pop("content"))
            return Picture(pixels=np.frombuffer(content, np.uint8).reshape(held.pop("shape")), **held)
        case "file":
            return File(held["path"], base64.b64decode(held["content"]))
        case "point":
            return Point(**held)
        case "tag":
            return Tag(**held)
    raise ValueError(f"kind: {kind!r}")
