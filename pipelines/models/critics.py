"""Networks that read images for an adversary."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pipelines.models.network import Images, Network
from pipelines.shape import ImageShape

SMALLEST_MAP = 4
"""Side of the maps, in pixels, from which they are no longer halved."""


class Critic(Network):
    """Convolutions of stride 2 down to a small map, then one linear layer: (b, c, h, w) in [−1, 1] → (b, features).

    After the discriminator of DCGAN (Radford, Metz & Chintala 2016) without its normalisation: a critic whose answer
    for one image depended on the images beside it would have no gradient penalty of its own (Gulrajani et al. 2017,
    section 4), and would differ with the number of ranks.

    Args:
        image: shape of the images.
        width: channels of the first layer; each further one has twice as many, up to 8 times.
        features: numbers that it gives for an image; 1 for a score.
        spectral: whether each layer's weights are divided by their spectral norm (Miyato et al. 2018), so that the
            critic is 1-Lipschitz up to the slopes of its activations.
    """

    def __init__(self, image: ImageShape, width: int, features: int = 1, *, spectral: bool = False) -> None:
        super().__init__()
        self.image = image
        self.features = features
        height, across, channels = image.height, image.width, image.channels
        layers: list[nn.Module] = []
        wanted = width
        while max(height, across) > SMALLEST_MAP:
            convolution = nn.Conv2d(channels, wanted, 4, stride=2, padding=1)
            layers += [spectral_norm(convolution) if spectral else convolution, nn.LeakyReLU(0.2)]
            channels, height, across = wanted, max(height // 2, 1), max(across // 2, 1)
            wanted = min(2 * wanted, 8 * width)
        last = nn.Linear(channels * height * across, features)
        self.layers = nn.Sequential(*layers, nn.Flatten(), spectral_norm(last) if spectral else last)

    def forward(self, images: Images) -> Float[Tensor, "b {self.features}"]:
        """What it says of a batch of images."""
        return self.layers(images)
