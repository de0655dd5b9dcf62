"""Auto-encoder that learns features of images without labels."""

from __future__ import annotations

import itertools

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.models.network import Encoder, Images
from pipelines.shape import ImageShape

SMALLEST_MAP = 8
"""Side of feature maps, in pixels, at which halving stops."""


class AutoEncoder(Encoder):
    """An encoder of strided convolutions that maps images to codes, and a decoder that maps codes to images.

    It is trained on images with hidden patches (Pathak et al. 2016, "Context encoders"; He et al. 2022, "Masked
    autoencoders are scalable vision learners"). Its layers can be features of a transport cost.

    Args:
        image: shape of the images; any size.
        width: number of channels of the first layer; each further layer has twice as many, up to 8 ``width``.
        code: dimension of the code.
    """

    def __init__(self, image: ImageShape, width: int, code: int) -> None:
        sizes = [(image.height, image.width)]
        while not sizes[1:] or max(sizes[-1]) > SMALLEST_MAP:
            height, across = sizes[-1]
            sizes.append((-(-height // 2), -(-across // 2)))
        super().__init__(image, code, len(sizes))
        channels = [image.channels, *(width * min(2**k, 8) for k in range(len(sizes) - 1))]
        self.sizes = sizes
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, narrow, 3, stride=2, padding=1), nn.LeakyReLU(0.2))
            for wide, narrow in itertools.pairwise(channels)
        )
        height, across = sizes[-1]
        self.to_code = nn.Linear(channels[-1] * height * across, code)
        self.unfold = nn.Sequential(
            nn.Linear(code, channels[-1] * height * across),
            nn.Unflatten(1, (channels[-1], height, across)),
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)
            for narrow, wide in reversed(list(itertools.pairwise(channels)))
        )

    def maps(self, images: Images) -> list[Float[Tensor, "b ..."]]:
        """See :meth:`Encoder.maps`."""
        found = [images]
        for layer in self.down:
            found.append(layer(found[-1]))
        return [*found[1:], self.to_code(found[-1].flatten(1))]

    def forward(self, images: Images) -> Images:
        """Reconstruct images from their codes."""
        maps = self.unfold(self.embed(images))
        for layer, (height, across) in zip(self.up, reversed(self.sizes[:-1]), strict=True):
            maps = layer(F.leaky_relu(maps, 0.2))[..., :height, :across]
        return maps
