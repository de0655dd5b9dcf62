"""Networks that generate."""

from __future__ import annotations

import itertools
import math

from torch import nn

from pipelines.models.network import Conditions, Generator, Images, Latents
from pipelines.shape import ImageShape


class ConvGenerator(Generator):
    """A latent vector unfolded to a small map, then upsampled and convolved to an image.

    After DCGAN (Radford, Metz & Chintala 2016), with group for batch normalisation, so that a sample does not depend on
    the samples beside it and the ranks of a job need not exchange statistics. ``nearest`` upsampling repeats pixels
    before a convolution; ``transposed`` convolutions, DCGAN's own, compute less but leave a checkerboard in what was
    trained little (Odena, Dumoulin & Olah 2016).

    Args:
        image: shape of the output; any size.
        latent: dimension of the input.
        width: channels of the last hidden layer; each coarser layer has twice as many, up to 8 times.
        transposed: whether convolutions are transposed.
    """

    def __init__(self, image: ImageShape, latent: int, width: int, *, transposed: bool = False) -> None:
        super().__init__(image, latent)
        side = max(image.height, image.width)
        doublings = max(1, round(math.log2(side / 7)))
        self.coarse = math.ceil(side / 2**doublings)
        channels = [width * min(2**k, 8) for k in range(doublings, -1, -1)]
        self.unfold = nn.Sequential(
            nn.Linear(latent, channels[0] * self.coarse**2),
            nn.Unflatten(1, (channels[0], self.coarse, self.coarse)),
            nn.GroupNorm(_groups(channels[0]), channels[0]),
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(channels):
            if transposed:
                blocks.append(nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
            else:
                blocks += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(wide, narrow, 3, padding=1)]
            blocks += [nn.GroupNorm(_groups(narrow), narrow), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.to_pixels = nn.Conv2d(channels[-1], image.channels, 3, padding=1)

    def forward(self, latents: Latents, conditions: Conditions | None = None) -> Images:
        """See :class:`Generator`."""
        maps = self.blocks(self.unfold(latents))
        return self.to_pixels(maps)[..., : self.image.height, : self.image.width].tanh()


def _groups(channels: int) -> int:
    return math.gcd(channels, 8)
