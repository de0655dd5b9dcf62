"""Cartoon characters composed from parts: a body, eyes, a mouth, …, each drawn at random, laid over one another.

The parts are PNG files of the PyPI package ``robohash`` 2.0, which is downloaded as a file and never installed. NOTICE
names their authors and licences. There are five sets, and a character takes one part of each category of its set::

    kittens     body, fur, eyes, mouth, accessories
    people      body, eye, eyebrow, mouth, cloth, facial-hair, top, accessories
    robots      colour; body, face, accessory, eyes, mouth, all of that colour
    monsters    face-colors, body-colors, faces, body, eyes, mouth, nose
    heads       base-face, wave, antenna, eyes, eyebrows, nose, mouth

Classes are the sets. The parts of an image are a function of the seed and its number alone, so that a larger data set
begins with the smaller one, and all that an image shows is known, see :func:`attributes`.
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
"""Side of the images in pixels, where the spec names none."""


@dataclass(frozen=True)
class Attributes:
    """What the images of one set show.

    Attributes:
        categories: of the set, the lowest layer first.
        images: (n,) int64 numbers of the images.
        parts: (n, categories) int64: for each image the position of its part in each category.
    """

    categories: tuple[Category, ...]
    images: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True)
class CharacterSource(Source):
    """Characters, composed when they are asked for.

    Attributes:
        spec: which, and how many.
        files: the sheet of each set.
    """

    spec: CharactersSpec
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return self.spec.count

    def __getstate__(self) -> dict[str, object]:
        # The mapped pages stay behind; the other process maps the files itself.
        return {name: value for name, value in self.__dict__.items() if name != "sheets"}

    @cached_property
    def sheets(self) -> tuple[Sheet, ...]:
        """The parts of each set, mapped into memory."""
        return tuple(read_sheet(file) for file in self.files)

    def name(self, i: int) -> str:
        return f"characters[{i}]"

    def item(self, i: int) -> tuple[str, int, np.ndarray]:
        label = i % len(self.sheets)  # the sets in turn
        sheet = self.sheets[label]
        image = Image.fromarray(sheet.compose(sheet.draw(self.spec.seed, i)))
        return self.name(i), label, crop_and_resize(image, self.image.height, self.image.channels)

    def attributes(self) -> dict[CharacterSet, Attributes]:
        """What the images show, by set."""
        found: dict[CharacterSet, Attributes] = {}
        for label, (name, sheet) in enumerate(zip(self.spec.sets, self.sheets, strict=True)):
            images = np.arange(label, len(self), len(self.sheets))
            drawn = [sheet.draw(self.spec.seed, i) for i in images.tolist()]
            parts = np.array(drawn, np.int64).reshape(len(images), len(sheet.categories))
            found[name] = Attributes(sheet.categories, images, parts)
        return found


def attributes(spec: DataSpec, cache: Path) -> dict[CharacterSet, Attributes]:
    """What the images of a data set of characters show, by set.

    Args:
        spec: of the data set; shards keep the numbers of the images.
        cache: folder of downloads.

    Raises:
        SourceError: the parts cannot be fetched, or are not those that they should be.
    """
    return open_characters(spec, cache).attributes()


def open_characters(spec: DataSpec, cache: Path) -> CharacterSource:
    """A source of characters; their parts are fetched and shrunk if they are not in the cache in this size.

    Raises:
        SourceError: the parts cannot be fetched, or are not those that they should be.
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
    """sha256 of all that decides which characters there are."""
    decisive = spec.model_dump(mode="json") | {"wheel": WHEEL.sha256, "recipe": RECIPE}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
