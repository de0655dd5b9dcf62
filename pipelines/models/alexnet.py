"""AlexNet (Krizhevsky, Sutskever & Hinton 2012)."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.errors import SpecError
from pipelines.models.network import Classifier, Features, Images, Logits
from pipelines.shape import ImageShape

FULL_SIZE = 64
"""Smallest side, in pixels, for which the paper's first layers are used; they divide the side by 8."""

CHANNELS = (64, 192, 384, 256, 256)


class AlexNet(Classifier):
    """Five convolutions and three full layers with ReLU and dropout.

    This is the single-tower variant (Krizhevsky, *One weird trick for parallelizing convolutional neural networks*,
    2014, footnote 1) without response normalisation; the paper of 2012 had two towers on two GPUs. With images of 227
    or 224 pixels and 1000 classes it has 61,100,840 parameters. For images smaller than 64 pixels, the first two
    convolutions are 3 × 3 without stride.

    Args:
        image: shape of the input, at least 8 × 8 pixels.
        classes: number of outputs.
        hidden: number of units of the two hidden fully connected layers; 4096 in the paper.
        dropout: dropout probability of the inputs of these layers.
    """

    def __init__(self, image: ImageShape, classes: int, hidden: int = 4096, dropout: float = 0.5) -> None:
        super().__init__(image, classes)
        side = min(image.height, image.width)
        if side < 8:
            raise SpecError(
                f"model alexnet: images of {image.height}×{image.width} pixels are too small for its poolings",
                hint="set data.size to 8 or more, or use an mlp",
            )
        a, b, c, d, e = CHANNELS
        large = side >= FULL_SIZE
        pool = nn.MaxPool2d(3, 2) if large else nn.MaxPool2d(2)
        first = nn.Conv2d(image.channels, a, 11, 4, 2) if large else nn.Conv2d(image.channels, a, 3, padding=1)
        second = nn.Conv2d(a, b, 5, padding=2) if large else nn.Conv2d(a, b, 3, padding=1)
        self.body = nn.Sequential(
            first, nn.ReLU(), pool, second, nn.ReLU(), pool,
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), pool, nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            width = self.body(torch.zeros(1, *image.dims)).shape[1]
        self.hidden = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width, hidden), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(),
        )  # fmt: skip
        self.last = nn.Linear(hidden, classes)

    def embed(self, images: Images) -> Features:
        """See :class:`Classifier`."""
        return self.hidden(self.body(images))

    def forward(self, images: Images) -> Logits:
        """See :class:`Classifier`."""
        return self.last(self.embed(images))
