"""Class-conditional generator of residual blocks."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.models.network import Conditions, Generator, Images, Latents
from pipelines.models.normalisation import GlobalBatchNorm
from pipelines.models.orthogonal import bounded
from pipelines.shape import ImageShape

EMBEDDING = 32
"""Dimension of the class embedding, which is shared by all blocks."""

Maps = Float[Tensor, "b c h w"]
Condition = Float[Tensor, "b t"]


class BigGan(Generator):
    """BigGAN's generator (Brock, Donahue & Simonyan 2019, appendix B), sized by the image.

    The latent vector is split into chunks. A linear layer maps the first chunk to a small feature map; each further
    chunk, concatenated with the class embedding, sets the scales and shifts of the batch normalisations of one block.
    Weights are initialised orthogonal and divided by their spectral norms. Interpolating between two class embeddings
    at a fixed latent vector interpolates between two classes (ibid., figures 8 and 9).

    Args:
        image: shape of the output; any size.
        latent: dimension of the input, at least the number of blocks plus one.
        width: number of channels of the last block; each coarser block has twice as many, up to 8 ``width``.
        conditions: number of classes.
    """

    def __init__(self, image: ImageShape, latent: int, width: int, conditions: int) -> None:
        super().__init__(image, latent, conditions)
        side = max(image.height, image.width)
        doublings = max(1, round(math.log2(side / 7)))
        self.coarse = math.ceil(side / 2**doublings)
        channels = [width * min(2**k, 8) for k in range(doublings, -1, -1)]
        first, *others = (len(piece) for piece in torch.arange(latent).tensor_split(doublings + 1))
        self.pieces = [first, *others]
        self.embedding = nn.Linear(conditions, EMBEDDING, bias=False)
        self.unfold = bounded(nn.Linear(first, channels[0] * self.coarse**2))
        self.blocks = nn.ModuleList(
            _Block(wide, narrow, EMBEDDING + piece)
            for (wide, narrow), piece in zip(itertools.pairwise(channels), others, strict=True)
        )
        self.norm = GlobalBatchNorm(channels[-1])
        self.to_pixels = bounded(nn.Conv2d(channels[-1], image.channels, 3, padding=1))

    def forward(self, latents: Latents, conditions: Conditions | None = None) -> Images:
        """See :class:`Generator`."""
        assert conditions is not None
        condition = self.embedding(conditions)
        first, *others = latents.split(self.pieces, dim=1)
        maps = self.unfold(first).unflatten(1, (-1, self.coarse, self.coarse))
        for block, piece in zip(self.blocks, others, strict=True):
            maps = block(maps, torch.cat([condition, piece], dim=1))
        maps = self.to_pixels(F.relu(self.norm(maps)))
        return maps[..., : self.image.height, : self.image.width].tanh()


class _Block(nn.Module):
    """Residual upsampling block: two convolutions with conditional batch normalisation, and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, condition: int) -> None:
        super().__init__()
        self.first_norm = _ConditionalNorm(channels_in, condition)
        self.first = bounded(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.second_norm = _ConditionalNorm(channels_out, condition)
        self.second = bounded(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = bounded(nn.Conv2d(channels_in, channels_out, 1))

    def forward(self, maps: Float[Tensor, "b i h w"], condition: Condition) -> Float[Tensor, "b o 2*h 2*w"]:
        moved = self.first(_doubled(F.relu(self.first_norm(maps, condition))))
        moved = self.second(F.relu(self.second_norm(moved, condition)))
        # A 1×1 convolution commutes with nearest-neighbour upsampling, and before it costs a quarter.
        return moved + _doubled(self.shortcut(maps))


class _ConditionalNorm(nn.Module):
    """Conditional batch normalisation: scales and shifts are linear in the condition (de Vries et al. 2017)."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = GlobalBatchNorm(channels, affine=False)
        self.to_scale_and_shift = bounded(nn.Linear(condition, 2 * channels, bias=False))

    def forward(self, maps: Maps, condition: Condition) -> Maps:
        scale, shift = self.to_scale_and_shift(condition)[..., None, None].chunk(2, dim=1)
        return self.norm(maps) * (1 + scale) + shift


def _doubled(maps: Maps) -> Float[Tensor, "b c 2*h 2*w"]:
    return F.interpolate(maps, scale_factor=2, mode="nearest")
