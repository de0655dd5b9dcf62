"""The parts of cartoon characters: out of the wheel that holds them, shrunk once, laid over one another."""

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
"""Raised by every change to the way in which parts are drawn, shrunk or laid over one another."""

_FOLDERS: dict[CharacterSet, str] = {
    "robots": "set1",
    "monsters": "set2",
    "heads": "set3",
    "kittens": "set4",
    "people": "set5",
}
# Folders are named number#text. Parts are stacked in the order of the texts, those of people in that of the numbers:
# by the texts, which for them state no order, glasses would lie below the head.
_BY_NUMBER: tuple[CharacterSet, ...] = ("people",)


@dataclass(frozen=True)
class Category:
    """One choice that is made for each character of a set.

    Attributes:
        name: as ``eyes``.
        parts: names of what there is to choose from; no two of them have the same pixels.
    """

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """The parts of one set in the size of the images, read from a file.

    Attributes:
        size: side of the images, in pixels.
        categories: the lowest layer first; before them the colour, where parts come in several.
        colours: number of colours.
        boxes: (colours × parts, 4) int64: left, top, right and bottom of what is not transparent.
        pixels: (bytes,) uint8: RGBA of the boxes, one after the other, the colours multiplied by alpha.
    """

    size: int
    categories: tuple[Category, ...]
    colours: int
    boxes: np.ndarray
    pixels: np.ndarray

    @cached_property
    def counts(self) -> np.ndarray:
        """Parts of each category."""
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
        """(categories,) int64 positions of the parts of an image: a function of seed and number alone."""
        random = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=64).digest()
        return (np.frombuffer(random, "<u8")[: len(self.counts)] % self.counts.astype(np.uint64)).astype(np.int64)

    def compose(self, parts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Lay parts over white.

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
    """Make sure that a sheet lies in the cache: its file holds the sha256 of its arrays, and a damaged one is replaced.

    Args:
        name: of the set.
        size: side of the images, in pixels.
        cache: folder of downloads.

    Returns:
        The file, for :func:`read_sheet`.

    Raises:
        SourceError: the wheel cannot be fetched, or is not the one that it should be.
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
    """A sheet, mapped into memory."""
    arrays = map_arrays(path)
    told = json.loads(arrays["told"].tobytes())
    categories = tuple(Category(name, tuple(parts)) for name, parts in told["categories"])
    return Sheet(told["size"], categories, told["colours"], arrays["boxes"], arrays["pixels"])


def _shrink(name: CharacterSet, size: int, archive: zipfile.ZipFile) -> Arrays:
    """All parts of a set in one size, by colour, category and name."""
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
    """sha256 of a part's pixels, then box and pixels of the shrunk part, the colours multiplied by alpha."""
    image = Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGBA").convert("RGBa")
    sha256 = hashlib.sha256(image.tobytes()).digest()
    # A filter without negative lobes: no colour becomes greater than its alpha.
    image = image.resize((size, size), Image.Resampling.HAMMING)
    box = image.getbbox() or (0, 0, 0, 0)
    left, top, right, bottom = box
    return sha256, np.array(box), np.asarray(image)[top:bottom, left:right]


def _part_name(path: PurePosixPath) -> str:
    """``mouth-10`` of ``000#blue_mouth-10.png`` below a folder of the colour blue."""
    return path.stem.rpartition("#")[2].removeprefix(path.parent.parent.name).lstrip("_")


def _category_name(folder: str) -> str:
    """``facial-hair`` of ``005#FacialHair``."""
    text = folder.rpartition("#")[2].lstrip("0123456789")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", text).lower()


def _natural(name: str) -> str:
    """A key that sorts ``body10`` behind ``body9``."""
    return re.sub(r"[0-9]+", lambda number: number.group().zfill(4), name)
