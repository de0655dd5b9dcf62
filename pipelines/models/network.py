"""Base classes of networks."""

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
"""Types with shapes in terms of attributes of the network whose method uses them."""


class Network(nn.Module):
    """A module that counts its parameters."""

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


class Classifier(Network):
    """Maps images to one logit per class: (b, c, h, w) in [−1, 1] → (b, classes).

    Attributes:
        image: shape of the input.
        classes: number of outputs.
    """

    def __init__(self, image: ImageShape, classes: int) -> None:
        super().__init__()
        self.image = image
        self.classes = classes

    def embed(self, images: Images) -> Features:
        """Input of the last layer, (b, features)."""
        raise NotImplementedError

    def forward(self, images: Images) -> Logits:
        """Logits for a batch of images."""
        raise NotImplementedError


class Encoder(Network):
    """Maps images to codes: (b, c, h, w) in [−1, 1] → (b, code).

    Attributes:
        image: shape of the input.
        code: dimension of the code.
        layers: number of layers; the output of the last one is the code.
    """

    def __init__(self, image: ImageShape, code: int, layers: int) -> None:
        super().__init__()
        self.image = image
        self.code = code
        self.layers = layers

    def maps(self, images: Images) -> list[Float[Tensor, "b ..."]]:
        """Outputs of all layers, in order: (b, channels, h, w) for convolutions, (b, code) for the last layer."""
        raise NotImplementedError

    def embed(self, images: Images) -> Float[Tensor, "b {self.code}"]:
        """Codes of a batch of images."""
        return self.maps(images)[-1]


class Generator(Network):
    """Maps latent vectors to images: (b, latent) → (b, c, h, w) in [−1, 1].

    Attributes:
        image: shape of the output.
        latent: dimension of the input, which is standard normal.
        conditions: number of classes of a conditional generator; 0 for an unconditional one.
    """

    def __init__(self, image: ImageShape, latent: int, conditions: int = 0) -> None:
        super().__init__()
        self.image = image
        self.latent = latent
        self.conditions = conditions

    def forward(self, latents: Latents, conditions: Conditions | None = None) -> Images:
        """Images for a batch of latent vectors.

        Args:
            latents: latent vectors, (b, latent).
            conditions: weights of the classes for each image, (b, conditions), summing to 1: a basis vector selects one
                class, a mixture interpolates. Required if the generator is conditional, else None.
        """
        raise NotImplementedError

    def asked(self, labels: Int64[Tensor, " b"]) -> Float[Tensor, "b {self.conditions}"] | None:
        """Conditions that select these classes, (b,) → (b, conditions); None for an unconditional generator."""
        if not self.conditions:
            return None
        return F.one_hot(labels, self.conditions).to(next(self.parameters()).dtype)

    def in_turn(self, count: int, device: torch.device) -> Float[Tensor, "{count} {self.conditions}"] | None:
        """Conditions that cycle through the classes; None for an unconditional generator."""
        return self.asked(torch.arange(count, device=device) % max(self.conditions, 1))
