"""Images in arrays: data sets of the catalogue, and .npz files."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from pipelines.data.arrays import map_arrays, write_arrays
from pipelines.data.catalogue import Arrays
from pipelines.data.decode import crop_and_resize
from pipelines.data.sources.base import Source, prepared, shape_of
from pipelines.errors import SourceError
from pipelines.spec import DataSpec


@dataclass(frozen=True)
class ArraySource(Source):
    """Images in a file of arrays, see :data:`pipelines.data.catalogue.Arrays`.

    Attributes:
        path: path of the file.
    """

    path: Path

    drops_twins: ClassVar[bool] = False  # a catalogue's split is kept as published, so that results compare

    def __len__(self) -> int:
        return len(self.arrays["labels"])

    def __getstate__(self) -> dict[str, object]:
        # The mapped arrays are not pickled; the other process maps the file itself.
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}

    @cached_property
    def arrays(self) -> Arrays:
        """The memory-mapped arrays."""
        return map_arrays(self.path)

    def name(self, i: int) -> str:
        return f"{self.path.stem}[{i}]"

    def item(self, i: int) -> tuple[str, int, np.ndarray]:
        pixels, label = self.arrays["images"][i], int(self.arrays["labels"][i])
        if pixels.shape == (self.image.height, self.image.width, self.image.channels):
            return self.name(i), label, np.ascontiguousarray(pixels.transpose(2, 0, 1))
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return self.name(i), label, crop_and_resize(image, self.image.height, self.image.channels)

    def official_split(self, start: int, stop: int) -> np.ndarray | None:
        split = self.arrays.get("split")
        return None if split is None else split[start:stop]


def npz_identity(path: Path) -> str:
    """Compute the sha256 of path, size and modification time of an .npz file."""
    status = path.stat()
    return hashlib.sha256(f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()


def open_npz(spec: DataSpec, path: Path, cache: Path) -> ArraySource:
    """Unpack an .npz file once, so that many processes can read single images from it.

    Raises:
        SourceError: if the file is not an .npz file, or its arrays are invalid.
    """
    identity = npz_identity(path)
    unpacked = cache / f"{path.stem}-{identity[:16]}.safetensors"
    if not unpacked.is_file():
        images, labels, classes = _read_npz(path)
        encoded = np.frombuffer(json.dumps(classes).encode(), np.uint8)
        write_arrays(unpacked, {"images": images, "labels": labels, "classes": encoded})
    names = json.loads(map_arrays(unpacked)["classes"].tobytes())
    return array_source(spec, unpacked, tuple(names), identity)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    layout = "give arrays `images` (n, h, w) or (n, h, w, c) uint8, c = 1 or 3, and `labels` (n,)"
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path}: {error}", hint=layout) from None
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise SourceError(f"{path}: images has shape {images.shape} and type {images.dtype}", hint=layout)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iuU":
        raise SourceError(
            f"{path}: labels has shape {labels.shape} and type {labels.dtype} for {len(images)} images", hint=layout
        )
    values, positions = np.unique(labels, return_inverse=True)
    return images, positions.astype(np.int64), tuple(str(value) for value in values)


def array_source(spec: DataSpec, path: Path, classes: tuple[str, ...], identity: str) -> ArraySource:
    """Create a source from the arrays in a safetensors file.

    Raises:
        SourceError: if the images are too large to keep their size.
    """
    _, height, width, _ = map_arrays(path)["images"].shape
    return ArraySource(
        classes=classes,
        image=shape_of(spec, spec.size or min(height, width)),
        fingerprint=prepared(spec, identity),
        ignored=0,
        path=path,
    )
