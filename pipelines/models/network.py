"""What every network of Monge has in common."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.shape import ImageShape

Images = Float[Tensor, "b {self.image.channels} {self.image.height} {self.image.width}"]
Latents = Float[Tensor, "b {self.latent}"]
Logits = Float[Tensor, "b {self.classes}"]
Features = Float[Tensor, "b features"]
Conditions = Float[Tensor, "b {self.conditions}"]
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

    def embed(self, images: Images) -> Features:
        """What the last layer is given: (b, features)."""
        raise NotImplementedError

    def forward(self, images: Images) -> Logits:
        """Logits of a batch of images."""
        raise NotImplementedError


class Encoder(Network):
    """Images in, vectors out: (b, c, h, w) in [−1, 1] → (b, code).

    Attributes:
        image: the shape of its input.
        code: the dimension of its output.
        layers: the number of its layers; the last one gives the code.
    """

    def __init__(self, image: ImageShape, code: int, layers: int) -> None:
        super().__init__()
        self.image = image
        self.code = code
        self.layers = layers

    def maps(self, images: Images) -> list[Float[Tensor, "b ..."]]:
        """What each layer gives, in order: (b, channels, h, w) of the convolutions, (b, code) of the last."""
        raise NotImplementedError

    def embed(self, images: Images) -> Float[Tensor, "b {self.code}"]:
        """The codes of images."""
        return self.maps(images)[-1]


class Generator(Network):
    """Latent vectors in, images out: (b, latent) → (b, c, h, w) in [−1, 1].

    Attributes:
        image: the shape of its output.
        latent: the dimension of its input, standard normal.
        conditions: the number of classes of which an image can be asked for; 0 where it cannot.
    """

    def __init__(self, image: ImageShape, latent: int, conditions: int = 0) -> None:
        super().__init__()
        self.image = image
        self.latent = latent
        self.conditions = conditions

    def forward(self, latents: Latents, conditions: Conditions | None = None) -> Images:
        """Images of a batch of latent vectors.

        Args:
            latents: (b, latent).
            conditions: (b, conditions) weights of the classes in each image, summing to 1: a basis vector asks for one
                class, a mixture for something between. Given if and only if the generator is conditional.
        """
        raise NotImplementedError

    def asked(self, labels: Int64[Tensor, " b"]) -> Float[Tensor, "b {self.conditions}"] | None:
        """The conditions that ask for these classes, (b,) → (b, conditions); None of an unconditional generator."""
        if not self.conditions:
            return None
        return F.one_hot(labels, self.conditions).to(next(self.parameters()).dtype)

    def in_turn(self, count: int, device: torch.device) -> Float[Tensor, "{count} {self.conditions}"] | None:
        """Conditions that ask for one class after the other; None of an unconditional generator."""
        return self.asked(torch.arange(count, device=device) % max(self.conditions, 1))
