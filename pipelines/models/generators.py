"""Networks that generate."""

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
    """A latent vector unfolded to a small map, then upsampled and convolved to an image.

    After DCGAN (Radford, Metz & Chintala 2016). With group normalisation a sample does not depend on the samples beside
    it, and the ranks of a job need not exchange statistics; with batch normalisation, DCGAN's own, they do, and samples
    that would all become one another are held apart. ``nearest`` upsampling repeats pixels before a convolution.
    ``transposed`` convolutions, DCGAN's own, compute less but leave a checkerboard in what was trained little (Odena,
    Dumoulin & Olah 2016). ``filtered`` ones cost the same and leave none, see :class:`FilteredConvTranspose`.

    Args:
        image: shape of the output; any size.
        latent: dimension of the input.
        width: channels of the last hidden layer; each coarser layer has twice as many, up to 8 times.
        upsampling: how maps are enlarged.
        batch_norm: whether maps are normalised over the global batch in place of each image.
        conditions: number of classes of which an image can be asked for; the class moves the first map.
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
