"""AlexNet (Krizhevsky, Sutskever & Hinton 2012)."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.errors import SpecError
from pipelines.models.network import Classifier, Features, Images, Logits
from pipelines.shape import ImageShape

FULL_SIZE = 64
"""Side in pixels from which images pass through the paper's first layers, which divide it by 8."""

CHANNELS = (64, 192, 384, 256, 256)


class AlexNet(Classifier):
    """Five convolutions and three full layers with ReLU and dropout.

    In one tower (Krizhevsky, *One weird trick for parallelizing convolutional neural networks*, 2014, footnote 1),
    where the paper of 2012 had two on two GPUs that met here and there, and without its response normalisation. Images
    of 227 or 224 pixels and 1000 classes make 61,100,840 parameters. Smaller images than 64 pixels pass through
    convolutions of 3 × 3 without strides, and full layers of ``hidden`` units.

    Args:
        image: shape of the input, from 8 pixels.
        classes: number of outputs.
        hidden: units of the two hidden full layers; 4096 in the paper.
        dropout: probability of silencing one of their inputs in training.
    """

    def __init__(self, image: ImageShape, classes: int, hidden: int = 4096, dropout: float = 0.5) -> None:
        super().__init__(image, classes)
        side = min(image.height, image.width)
        if side < 8:
            raise SpecError(
                f"model alexnet: images of {image.height}×{image.width} vanish in its poolings",
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
