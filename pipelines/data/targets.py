"""Continuous functions of an image, for networks to approximate."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

TargetName = Literal["waves", "cone"]


def halves(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2"]:
    """Mean brightness of the left and of the right half of each image, (b, 2); in [−1, 1] as pixels are."""
    middle = images.shape[3] // 2
    return torch.stack([images[..., :middle].mean((1, 2, 3)), images[..., middle:].mean((1, 2, 3))], 1)


def target(images: Float[Tensor, "b c h w"], name: TargetName) -> Float[Tensor, " b"]:
    """A function of the halves (u, v) of each image.

    Args:
        images: (b, c, h, w) in [−1, 1].
        name: ``waves`` sin(πu) sin(πv), which is smooth; ``cone`` √(u² + v²), which has a kink.

    Returns:
        (b,) tensor.
    """
    places = halves(images)
    if name == "waves":
        return torch.sin(math.pi * places).prod(1)
    return torch.linalg.vector_norm(places, dim=1)
