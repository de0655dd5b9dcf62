"""Cartoon characters composed from layers of randomly drawn parts: a body, eyes, a mouth, ….

The parts are PNG files from the PyPI package ``robohash`` 2.0, which is downloaded as a file and never installed.
NOTICE lists their authors and licences. There are five sets, and a character has one part of each category of its set::

    kittens     body, fur, eyes, mouth, accessories
    people      body, eye, eyebrow, mouth, cloth, facial-hair, top, accessories
    robots      colour; body, face, accessory, eyes, mouth, all of that colour
    monsters    face-colors, body-colors, faces, body, eyes, mouth, nose
    heads       base-face, wave, antenna, eyes, eyebrows, nose, mouth

The sets are the classes. The parts of an image are a function of the seed and the number of the image only. A larger
data set therefore starts with the images of a smaller one, and the parts of all images are known, see
:func:`attributes`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.decode import crop_and_resize
from pipelines.data.sources.base import Source, prepared, shape_of
from pipelines.data.sources.parts import RECIPE, WHEEL, Category, Sheet, fetch_sheet, read_sheet
from pipelines.spec import CharacterSet, CharactersSpec, DataSpec

SIDE = 64
"""Default side of the images in pixels."""


@dataclass(frozen=True)
class Attributes:
    """Attributes of the images of one set.

    Attributes:
        categories: categories of the set, the lowest layer first.
        images: numbers of the images, (n,) int64.
        parts: position of each image's part in each category, (n, categories) int64.
    """

    categories: tuple[Category, ...]
    images: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True)
class CharacterSource(Source):
    """Characters, composed on demand.

    Attributes:
        spec: sets and number of characters.
        files: sheet file of each set.
    """

    spec: CharactersSpec
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return self.spec.count

    def __getstate__(self) -> dict[str, object]:
        # The mapped arrays are not pickled; the other process maps the files itself.
        return {name: value for name, value in self.__dict__.items() if name != "sheets"}

    @cached_property
    def sheets(self) -> tuple[Sheet, ...]:
        """The memory-mapped parts of each set."""
        return tuple(read_sheet(file) for file in self.files)

    def name(self, i: int) -> str:
        return f"characters[{i}]"

    def item(self, i: int) -> tuple[str, int, np.ndarray]:
        label = i % len(self.sheets)  # sets alternate
        sheet = self.sheets[label]
        image = Image.fromarray(sheet.compose(sheet.draw(self.spec.seed, i)))
        return self.name(i), label, crop_and_resize(image, self.image.height, self.image.channels)

    def attributes(self) -> dict[CharacterSet, Attributes]:
        """Return the attributes of the images, by set."""
        found: dict[CharacterSet, Attributes] = {}
        for label, (name, sheet) in enumerate(zip(self.spec.sets, self.sheets, strict=True)):
            images = np.arange(label, len(self), len(self.sheets))
            drawn = [sheet.draw(self.spec.seed, i) for i in images.tolist()]
            parts = np.array(drawn, np.int64).reshape(len(images), len(sheet.categories))
            found[name] = Attributes(sheet.categories, images, parts)
        return found


def attributes(spec: DataSpec, cache: Path) -> dict[CharacterSet, Attributes]:
    """Return the attributes of the images of a data set of characters, by set.

    Args:
        spec: spec of the data set; shards keep the numbers of the images.
        cache: folder of downloads.

    Raises:
        SourceError: if the parts cannot be downloaded, or have the wrong hash.
    """
    return open_characters(spec, cache).attributes()


def open_characters(spec: DataSpec, cache: Path) -> CharacterSource:
    """Open a source of characters; parts that are not in the cache in this size are downloaded and resized.

    Raises:
        SourceError: if the parts cannot be downloaded, or have the wrong hash.
    """
    asked = spec.characters or CharactersSpec()
    image = shape_of(spec, spec.size or SIDE)
    return CharacterSource(
        classes=asked.sets,
        image=image,
        fingerprint=prepared(spec, character_identity(asked)),
        ignored=0,
        spec=asked,
        files=tuple(fetch_sheet(name, image.height, cache) for name in asked.sets),
    )


def character_identity(spec: CharactersSpec) -> str:
    """Compute the sha256 of everything that determines the characters."""
    decisive = spec.model_dump(mode="json") | {"wheel": WHEEL.sha256, "recipe": RECIPE}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
