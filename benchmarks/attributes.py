"""Which parts generated characters show: classifiers of attributes that are known exactly for training images.

An :class:`AttributeReader` is trained for each set on characters of one seed, and tested on those of another seed.
Parts that it does not read reliably do not count.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.data.sources.characters import CharacterSource, open_characters
from pipelines.data.sources.parts import Category
from pipelines.models.bundle import to_float
from pipelines.spec import CharacterSet, CharactersSpec, DataSpec
from pipelines.training.precision import supports_bfloat16

SHOWN = 0.2
"""A part counts as covered when samples show it at least this fraction as often as training images do."""

READ = 0.8
"""Least fraction of held-out characters with a part in which the reader finds it."""

MISTAKEN = SHOWN / 2
"""Largest number of others that the reader takes for a part, relative to the characters with that part: samples without
the part then do not look as if they showed it."""

SEEDS = 101, 102
"""Of the characters that readers learn from and are tested on; the training data has another."""

BATCH = 128
RATE = 2e-3


@dataclass(frozen=True)
class Coverage:
    """How many of the parts that training images show are seen in samples.

    Attributes:
        covered: number of those that are.
        parts: number of all that can be read.
        missing: names of those that can be read and are not covered.
        unread: names of those that cannot be read.
    """

    covered: int
    parts: int
    missing: tuple[str, ...]
    unread: tuple[str, ...]


class AttributeReader(nn.Module):
    """Reads all attributes of a character at once: (b, 3, s, s) in [−1, 1] → logits of all parts of all categories.

    Args:
        side: of the images, a multiple of 16.
        counts: parts of each category.
        width: channels of the first layer.
    """

    def __init__(self, side: int, counts: list[int], width: int = 32) -> None:
        super().__init__()
        self.counts = counts
        layers: list[nn.Module] = []
        channels = (3, width, 2 * width, 4 * width, 4 * width)
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.Linear(4 * width * (side // 16) ** 2, sum(counts))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of each category, (b, parts)."""
        return list(self.heads(self.layers(images)).split(self.counts, dim=1))

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """The part of each category, (b, categories) int64, of (b, 3, s, s) uint8 images."""
        self.eval()
        return torch.cat(
            [torch.stack([logits.argmax(1) for logits in self(to_float(block))], 1) for block in images.split(BATCH)]
        )


def composed(data: DataSpec, name: CharacterSet, count: int, seed: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Characters of one set, (n, 3, s, s) uint8, and their parts, (n, categories)."""
    source = _source(data, name, count, seed, cache)
    images = torch.from_numpy(np.stack([source.item(i)[2] for i in range(count)]))
    return images, torch.from_numpy(source.attributes()[name].parts)


def learn(images: Tensor, parts: Tensor, counts: list[int], epochs: int) -> AttributeReader:
    """A reader of one set."""
    torch.manual_seed(0)
    reader = AttributeReader(images.shape[-1], counts).train()
    optimizer = torch.optim.Adam(reader.parameters(), RATE)
    steps = epochs * (len(images) // BATCH)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            with torch.autocast("cpu", torch.bfloat16, enabled=supports_bfloat16(images.device)):
                logits = reader(to_float(images[chosen]))
            loss = sum(F.cross_entropy(one.float(), part) for one, part in zip(logits, parts[chosen].T, strict=True))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            falling.step()
    return reader


@dataclass(frozen=True, eq=False)
class Examined:
    """A reader of one set, and what it reads reliably.

    Attributes:
        reader: of the set.
        categories: of the set.
        reliable: for each category, the parts that it reads.
    """

    reader: AttributeReader
    categories: tuple[Category, ...]
    reliable: tuple[list[int], ...]


def examine(data: DataSpec, name: CharacterSet, cache: Path, count: int = 12_000, epochs: int = 6) -> Examined:
    """Train a reader of one set, and test it.

    Args:
        data: of the characters that generators learn from.
        name: of the set.
        cache: folder of downloads.
        count: characters that the reader learns from; it is tested on a fifth of as many others.
        epochs: passes over them.
    """
    categories = _source(data, name, 10, 0, cache).attributes()[name].categories
    counts = [len(category.parts) for category in categories]
    reader = learn(*composed(data, name, count, SEEDS[0], cache), counts, epochs)
    images, parts = composed(data, name, max(count // 5, 1), SEEDS[1], cache)
    told = reader.read(images)
    reliable = tuple(readable(told[:, place], parts[:, place], number) for place, number in enumerate(counts))
    return Examined(reader, categories, reliable)


def coverage(samples: Tensor, examined: Examined) -> Coverage:
    """How many of the parts of a set are seen in samples of it, (n, 3, s, s) uint8."""
    found = examined.reader.read(samples)
    missing, unread = [], []
    for place, (category, reliable) in enumerate(zip(examined.categories, examined.reliable, strict=True)):
        scarce = rare(found[:, place], len(category.parts))
        for part, shown in enumerate(category.parts):
            if part not in reliable:
                unread.append(f"{category.name} {shown}")
            elif part in scarce:
                missing.append(f"{category.name} {shown}")
    total = sum(map(len, examined.reliable))
    return Coverage(total - len(missing), total, tuple(missing), tuple(unread))


def readable(found: Tensor, shown: Tensor, count: int) -> list[int]:
    """Parts that a reader finds where they are, and rarely elsewhere.

    Args:
        found: the part that the reader finds in each held-out character, (n,) int64.
        shown: the part that it has, (n,) int64.
        count: of parts.
    """
    have = torch.bincount(shown, minlength=count)
    right = torch.bincount(shown[found == shown], minlength=count)
    mistaken = torch.bincount(found[found != shown], minlength=count)
    return ((right >= READ * have) & (mistaken <= MISTAKEN * have) & (have > 0)).nonzero().flatten().tolist()


def rare(found: Tensor, count: int) -> list[int]:
    """Parts that samples show too rarely, given that training images show all parts equally often.

    Args:
        found: the part of each sample, (n,) int64.
        count: of parts.
    """
    times = torch.bincount(found, minlength=count)
    return (times < SHOWN * len(found) / count).nonzero().flatten().tolist()


def _source(data: DataSpec, name: CharacterSet, count: int, seed: int, cache: Path) -> CharacterSource:
    characters = CharactersSpec(sets=(name,), count=count, seed=seed)
    return open_characters(data.model_copy(update={"characters": characters}), cache)
