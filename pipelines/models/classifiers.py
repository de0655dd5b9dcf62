"""Networks that discriminate: the article's progression from one layer to shared weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.errors import SpecError
from pipelines.models.network import Classifier, Features, Images, Logits
from pipelines.shape import ImageShape


class Perceptron(Classifier):
    """One linear layer (Rosenblatt, *The perceptron*, 1958), one output for each class."""

    def __init__(self, image: ImageShape, classes: int) -> None:
        super().__init__(image, classes)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(image.pixels, classes))

    @property
    def weights(self) -> Float[Tensor, "classes c h w"]:
        """The weights of each output, as an image of the input's shape: (classes, c, h, w)."""
        return self.layers.get_parameter("1.weight").view(self.classes, *self.image.dims)

    def embed(self, images: Images) -> Features:
        """See :class:`Classifier`."""
        return self.layers[:-1](images)

    def forward(self, images: Images) -> Logits:
        """See :class:`Classifier`."""
        return self.layers(images)


class MLP(Classifier):
    """Fully connected layers with ReLU between them.

    One hidden layer is the network of the universal approximation theorem (Cybenko, *Approximation by superpositions
    of a sigmoidal function*, 1989).

    Args:
        image: shape of the input.
        classes: number of outputs.
        hidden: width of each hidden layer.
        dropout: probability of silencing a hidden unit in training (Srivastava et al. 2014).
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

    Two convolutions of shared weights, each halved, then three full layers of 120, 84 and one unit for each class;
    with ReLU for the sigmoid and max pooling for the trained average.
    """

    def __init__(self, image: ImageShape, classes: int, dropout: float = 0.5) -> None:
        super().__init__(image, classes)
        if min(image.height, image.width) < 12:
            raise SpecError(
                f"model lenet: images of {image.height}×{image.width} vanish in its two poolings",
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
