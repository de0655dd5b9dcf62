"""Perceptron, multilayer perceptron and LeNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.errors import SpecError
from pipelines.models.network import Classifier, Features, Images, Logits
from pipelines.shape import ImageShape


class Perceptron(Classifier):
    """One linear layer (Rosenblatt, *The perceptron*, 1958) with one output per class."""

    def __init__(self, image: ImageShape, classes: int) -> None:
        super().__init__(image, classes)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(image.pixels, classes))

    @property
    def weights(self) -> Float[Tensor, "classes c h w"]:
        """Weights of each output in the shape of the input image, (classes, c, h, w)."""
        return self.layers.get_parameter("1.weight").view(self.classes, *self.image.dims)

    def embed(self, images: Images) -> Features:
        """See :class:`Classifier`."""
        return self.layers[:-1](images)

    def forward(self, images: Images) -> Logits:
        """See :class:`Classifier`."""
        return self.layers(images)


class MLP(Classifier):
    """Fully connected layers with ReLU between them.

    With one hidden layer, this is the network of the universal approximation theorem (Cybenko, *Approximation by
    superpositions of a sigmoidal function*, 1989).

    Args:
        image: shape of the input.
        classes: number of outputs.
        hidden: widths of the hidden layers.
        dropout: dropout probability of hidden units (Srivastava et al. 2014).
    """

    def __init__(self, image: ImageShape, classes: int, hidden: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__(image, classes)
        layers: list[nn.Module] = [nn.Flatten()]
        width = image.pixels
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(dropout)]
            width = next_width
        layers.append(nn.Linear(width, classes))
        self.layers = nn.Sequential(*layers)

    def embed(self, images: Images) -> Features:
        """See :class:`Classifier`."""
        return self.layers[:-1](images)

    def forward(self, images: Images) -> Logits:
        """See :class:`Classifier`."""
        return self.layers(images)


class LeNet(Classifier):
    """LeNet-5 (LeCun et al., *Gradient-based learning applied to document recognition*, 1998, fig. 2).

    Two convolutions, each followed by pooling, then three fully connected layers with 120, 84 and ``classes`` units;
    with ReLU instead of sigmoids and max pooling instead of trained averages.
    """

    def __init__(self, image: ImageShape, classes: int, dropout: float = 0.5) -> None:
        super().__init__(image, classes)
        if min(image.height, image.width) < 12:
            raise SpecError(
                f"model lenet: images of {image.height}×{image.width} pixels are too small for its two poolings",
                hint="set data.size to 12 or more, or use an mlp",
            )
        self.features = nn.Sequential(
            nn.Conv2d(image.channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            width = self.features(torch.zeros(1, *image.dims)).shape[1]
        self.head = nn.Sequential(
            nn.Linear(width, 120), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
        )  # fmt: skip

    def embed(self, images: Images) -> Features:
        """See :class:`Classifier`."""
        return self.head[:-1](self.features(images))

    def forward(self, images: Images) -> Logits:
        """See :class:`Classifier`."""
        return self.head(self.features(images))
