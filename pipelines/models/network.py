"""What every network of Monge has in common."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from pipelines.shape import ImageShape

Images = Float[Tensor, "b {self.image.channels} {self.image.height} {self.image.width}"]
Latents = Float[Tensor, "b {self.latent}"]
Logits = Float[Tensor, "b {self.classes}"]
"""Shapes by the attributes of the network whose method takes or returns them."""


class Network(nn.Module):
    """A module that counts its own parameters."""

    @property
    def parameter_count(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


class Classifier(Network):
    """Images in, one logit for each class out: (b, c, h, w) in [−1, 1] → (b, classes).

    Attributes:
        image: the shape of its input.
        classes: the number of its outputs.
    """

    def __init__(self, image: ImageShape, classes: int) -> None:
        super().__init__()
        self.image = image
        self.classes = classes

    def forward(self, images: Images) -> Logits:
        """Logits of a batch of images."""
        raise NotImplementedError


class Generator(Network):
    """Latent vectors in, images out: (b, latent) → (b, c, h, w) in [−1, 1].

    Attributes:
        image: the shape of its output.
        latent: the dimension of its input, standard normal.
    """

    def __init__(self, image: ImageShape, latent: int) -> None:
        super().__init__()
        self.image = image
        self.latent = latent

    def forward(self, latents: Latents) -> Images:
        """Images of a batch of latent vectors."""
        raise NotImplementedError
