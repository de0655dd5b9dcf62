"""Coverage of parts by generated characters, from classifiers of attributes that are known for training images.

An :class:`AttributeReader` is trained for each set on characters of one seed and tested on characters of another seed.
Parts that it does not read reliably are not counted.
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
"""A part is covered if its frequency in samples is at least this fraction of its frequency in training images."""

READ = 0.8
"""Minimum recall of a reliably read part on held-out characters."""

MISTAKEN = SHOWN / 2
"""Maximum number of false positives of a reliably read part, relative to the number of characters with the part; a part
that samples do not have is then not counted as covered."""

SEEDS = 101, 102
"""Seeds of the characters for training and testing readers; the training data of generators has another seed."""

BATCH = 128
RATE = 2e-3


@dataclass(frozen=True)
class Coverage:
    """Coverage of the parts of training images by samples.

    Attributes:
        covered: number of covered parts.
        parts: number of reliably read parts.
        missing: names of reliably read parts that are not covered.
        unread: names of parts that are not read reliably.
    """

    covered: int
    parts: int
    missing: tuple[str, ...]
    unread: tuple[str, ...]


class AttributeReader(nn.Module):
    """Reads all attributes of a character at once: (b, 3, s, s) in [−1, 1] → logits of all parts of all categories.

    Args:
        side: side of the images, a multiple of 16.
        counts: number of parts of each category.
        width: number of channels of the first layer.
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
        """Compute the logits of each category, (b, parts)."""
        return list(self.heads(self.layers(images)).split(self.counts, dim=1))

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """Predict the part of each category, (b, categories) int64, for (b, 3, s, s) uint8 images."""
        self.eval()
        return torch.cat(
            [torch.stack([logits.argmax(1) for logits in self(to_float(block))], 1) for block in images.split(BATCH)]
        )


def composed(data: DataSpec, name: CharacterSet, count: int, seed: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Compose characters of one set, (n, 3, s, s) uint8, and return them with their parts, (n, categories)."""
    source = _source(data, name, count, seed, cache)
    images = torch.from_numpy(np.stack([source.item(i)[2] for i in range(count)]))
    return images, torch.from_numpy(source.attributes()[name].parts)


def learn(images: Tensor, parts: Tensor, counts: list[int], epochs: int) -> AttributeReader:
    """Train a reader of one set."""
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
    """A reader of one set, and the parts that it reads reliably.

    Attributes:
        reader: reader of the set.
        categories: categories of the set.
        reliable: reliably read parts of each category.
    """

    reader: AttributeReader
    categories: tuple[Category, ...]
    reliable: tuple[list[int], ...]


def examine(data: DataSpec, name: CharacterSet, cache: Path, count: int = 12_000, epochs: int = 6) -> Examined:
    """Train and test a reader of one set.

    Args:
        data: training data of the generators.
        name: name of the set.
        cache: folder of downloads.
        count: number of training characters; the test uses a fifth as many others.
        epochs: number of epochs.
    """
    categories = _source(data, name, 10, 0, cache).attributes()[name].categories
    counts = [len(category.parts) for category in categories]
    reader = learn(*composed(data, name, count, SEEDS[0], cache), counts, epochs)
    images, parts = composed(data, name, max(count // 5, 1), SEEDS[1], cache)
    told = reader.read(images)
    reliable = tuple(readable(told[:, place], parts[:, place], number) for place, number in enumerate(counts))
    return Examined(reader, categories, reliable)


def coverage(samples: Tensor, examined: Examined) -> Coverage:
    """Compute the coverage of the parts of a set by samples, (n, 3, s, s) uint8."""
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
    """Return the parts that a reader reads reliably.

    Args:
        found: predicted part of each held-out character, (n,) int64.
        shown: true part of each held-out character, (n,) int64.
        count: number of parts.
    """
    have = torch.bincount(shown, minlength=count)
    right = torch.bincount(shown[found == shown], minlength=count)
    mistaken = torch.bincount(found[found != shown], minlength=count)
    return ((right >= READ * have) & (mistaken <= MISTAKEN * have) & (have > 0)).nonzero().flatten().tolist()


def rare(found: Tensor, count: int) -> list[int]:
    """Return the parts that are too rare in samples; all parts are equally frequent in training images.

    Args:
        found: part of each sample, (n,) int64.
        count: number of parts.
    """
    times = torch.bincount(found, minlength=count)
    return (times < SHOWN * len(found) / count).nonzero().flatten().tolist()


def _source(data: DataSpec, name: CharacterSet, count: int, seed: int, cache: Path) -> CharacterSource:
    characters = CharactersSpec(sets=(name,), count=count, seed=seed)
    return open_characters(data.model_copy(update={"characters": characters}), cache)
