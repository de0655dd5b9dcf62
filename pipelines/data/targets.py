"""Continuous functions of an image, as targets of regressions."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

TargetName = Literal["waves", "cone"]


def halves(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2"]:
    """Mean brightness of the left and the right half of each image, (b, 2), in [−1, 1]."""
    middle = images.shape[3] // 2
    return torch.stack([images[..., :middle].mean((1, 2, 3)), images[..., middle:].mean((1, 2, 3))], 1)


def target(images: Float[Tensor, "b c h w"], name: TargetName) -> Float[Tensor, " b"]:
    """Evaluate a function of the mean brightness (u, v) of the halves of each image.

    Args:
        images: images, (b, c, h, w) in [−1, 1].
        name: ``waves``: sin(πu) sin(πv), smooth; ``cone``: √(u² + v²), not differentiable at 0.

    Returns:
        Values, (b,).
    """
    places = halves(images)
    if name == "waves":
        return torch.sin(math.pi * places).prod(1)
    return torch.linalg.vector_norm(places, dim=1)
