"""Critics of adversarial objectives."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.models.network import Conditions, Images, Network
from pipelines.models.orthogonal import bounded, normalised
from pipelines.shape import ImageShape

SMALLEST_MAP = 4
"""Side of feature maps, in pixels, at which halving stops."""


class Critic(Network):
    """Maps images to scores: (b, c, h, w) in [−1, 1] → (b, features).

    Critics have no batch normalisation: the gradient penalty is only defined if the output for one image does not
    depend on the other images of the batch (Gulrajani et al. 2017, section 4), and the result must not depend on the
    number of ranks.

    A conditional critic adds to its score the inner product of the class embedding with the input of the last layer
    (projection discriminator, Miyato & Koyama 2018, eq. 3).

    Args:
        image: shape of the images.
        layers: network from images to vectors.
        last: linear layer from these vectors to features.
        by_condition: embedding of the classes, for a conditional critic with one feature.
    """

    def __init__(
        self, image: ImageShape, layers: nn.Module, last: nn.Linear, by_condition: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.image = image
        self.features = last.out_features
        self.conditions = by_condition.in_features if by_condition is not None else 0
        self.layers = layers
        self.last = last
        self.by_condition = by_condition

    def forward(self, images: Images, conditions: Conditions | None = None) -> Float[Tensor, "b {self.features}"]:
        """Scores for a batch of images; conditions as in :meth:`Generator.forward`."""
        vectors = self.layers(images)
        scores = self.last(vectors)
        if self.by_condition is None:
            return scores
        return scores + (self.by_condition(conditions) * vectors).sum(1, keepdim=True)


class ConvCritic(Critic):
    """Convolutions of stride 2 down to a small feature map, then one linear layer.

    This is the discriminator of DCGAN (Radford, Metz & Chintala 2016) without normalisation.

    Args:
        image: shape of the images.
        width: number of channels of the first layer; each further layer has twice as many, up to 8 ``width``.
        features: dimension of the output; 1 for a score.
        spectral: whether each layer's weights are divided by their spectral norm (Miyato et al. 2018), so that the
            critic is 1-Lipschitz up to the slopes of its activations.
        conditions: number of classes of a conditional critic; 0 for an unconditional one.
    """

    def __init__(
        self, image: ImageShape, width: int, features: int = 1, *, spectral: bool = False, conditions: int = 0
    ) -> None:
        height, across, channels = image.height, image.width, image.channels
        layers: list[nn.Module] = []
        wanted = width
        while max(height, across) > SMALLEST_MAP:
            convolution = nn.Conv2d(channels, wanted, 4, stride=2, padding=1)
            layers += [normalised(convolution, spectral), nn.LeakyReLU(0.2)]
            channels, height, across = wanted, max(height // 2, 1), max(across // 2, 1)
            wanted = min(2 * wanted, 8 * width)
        size = channels * height * across
        last = nn.Linear(size, features)
        embedding = nn.Linear(conditions, size, bias=False) if conditions else None
        super().__init__(
            image,
            nn.Sequential(*layers, nn.Flatten()),
            normalised(last, spectral),
            None if embedding is None else normalised(embedding, spectral),
        )


class ResidualCritic(Critic):
    """BigGAN's discriminator (Brock, Donahue & Simonyan 2019, appendix B), sized by the image.

    Residual blocks that halve the feature map, one residual block at constant size, a sum over pixels, and one linear
    layer. Weights are initialised orthogonal.

    Args:
        image: shape of the images.
        width: number of channels of the first block; each further block has twice as many, up to 8 ``width``.
        features: dimension of the output; 1 for a score.
        spectral: whether each layer's weights are divided by their spectral norm.
        conditions: number of classes of a conditional critic; 0 for an unconditional one.
    """

    def __init__(
        self, image: ImageShape, width: int, features: int = 1, *, spectral: bool = False, conditions: int = 0
    ) -> None:
        side, channels, wanted = max(image.height, image.width), image.channels, width
        blocks: list[nn.Module] = []
        while side > SMALLEST_MAP or not blocks:
            blocks.append(_Block(channels, wanted, spectral, halves=True, starts=not blocks))
            channels, side, wanted = wanted, -(-side // 2), min(2 * wanted, 8 * width)
        blocks.append(_Block(channels, channels, spectral))
        last = bounded(nn.Linear(channels, features), spectral)
        embedding = bounded(nn.Linear(conditions, channels, bias=False), spectral) if conditions else None
        super().__init__(image, nn.Sequential(*blocks, nn.ReLU(), _SumOfPixels()), last, embedding)


class _Block(nn.Module):
    """Residual block of two convolutions."""

    def __init__(
        self, channels_in: int, channels_out: int, spectral: bool, *, halves: bool = False, starts: bool = False
    ) -> None:
        super().__init__()
        self.halves = halves
        self.starts = starts
        self.first = bounded(nn.Conv2d(channels_in, channels_out, 3, padding=1), spectral)
        self.second = bounded(nn.Conv2d(channels_out, channels_out, 3, padding=1), spectral)
        alike = channels_in == channels_out
        self.shortcut = nn.Identity() if alike else bounded(nn.Conv2d(channels_in, channels_out, 1), spectral)

    def forward(self, maps: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        # The first block has no ReLU on its input, the pixels.
        moved = self.second(F.relu(self.first(maps if self.starts else F.relu(maps))))
        shortcut = self.shortcut(maps)
        if not self.halves:
            return moved + shortcut
        return F.avg_pool2d(moved + shortcut, 2, ceil_mode=True)


class _SumOfPixels(nn.Module):
    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return maps.sum((2, 3))
