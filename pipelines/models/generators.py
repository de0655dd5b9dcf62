"""Convolutional generator."""

from __future__ import annotations

import itertools
import math

from torch import nn

from pipelines.models.network import Conditions, Generator, Images, Latents
from pipelines.models.normalisation import GlobalBatchNorm
from pipelines.models.upsampling import upsampled
from pipelines.shape import ImageShape
from pipelines.spec import Upsampling


class ConvGenerator(Generator):
    """Maps a latent vector to a small feature map by a linear layer, then upsamples it to an image by convolutions.

    The design follows DCGAN (Radford, Metz & Chintala 2016). With group normalisation, a sample does not depend on the
    other samples of its batch, and ranks exchange no statistics. With batch normalisation, as in DCGAN, ranks exchange
    statistics, and the generator is less prone to mode collapse. ``nearest`` upsampling repeats pixels before a
    convolution. ``transposed`` convolutions, as in DCGAN, compute less but cause checkerboard artifacts early in
    training (Odena, Dumoulin & Olah 2016). ``filtered`` ones cost the same and cause no artifacts, see
    :class:`FilteredConvTranspose`.

    Args:
        image: shape of the output; any size.
        latent: dimension of the input.
        width: number of channels of the last hidden layer; each coarser layer has twice as many, up to 8 ``width``.
        upsampling: kind of upsampling.
        batch_norm: whether to normalise over the global batch instead of within each image.
        conditions: number of classes of a conditional generator, whose embedding is added to the first feature map; 0
            for an unconditional one.
    """

    def __init__(
        self,
        image: ImageShape,
        latent: int,
        width: int,
        *,
        upsampling: Upsampling = "nearest",
        batch_norm: bool = False,
        conditions: int = 0,
    ) -> None:
        super().__init__(image, latent, conditions)
        norm = GlobalBatchNorm if batch_norm else _group_norm
        side = max(image.height, image.width)
        doublings = max(1, round(math.log2(side / 7)))
        self.coarse = math.ceil(side / 2**doublings)
        channels = [width * min(2**k, 8) for k in range(doublings, -1, -1)]
        self.unfold = nn.Sequential(
            nn.Linear(latent, channels[0] * self.coarse**2),
            nn.Unflatten(1, (channels[0], self.coarse, self.coarse)),
            norm(channels[0]),
            nn.ReLU(),
        )
        size = channels[0] * self.coarse**2
        self.by_condition = nn.Linear(conditions, size, bias=False) if conditions else None
        blocks: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(channels):
            blocks += [*upsampled(upsampling, wide, narrow), norm(narrow), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.to_pixels = nn.Conv2d(channels[-1], image.channels, 3, padding=1)

    def forward(self, latents: Latents, conditions: Conditions | None = None) -> Images:
        """See :class:`Generator`."""
        first, *others = self.unfold
        unfolded = first(latents)
        if self.by_condition is not None:
            unfolded = unfolded + self.by_condition(conditions)
        for layer in others:
            unfolded = layer(unfolded)
        maps = self.blocks(unfolded)
        return self.to_pixels(maps)[..., : self.image.height, : self.image.width].tanh()


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(channels, 8), channels)
