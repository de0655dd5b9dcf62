"""Residual networks (He et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from pipelines.models.network import Classifier, Features, Images, Logits
from pipelines.models.normalisation import GlobalBatchNorm
from pipelines.shape import ImageShape

STAGES = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Number of blocks of each stage by depth: table 1 of the paper, and a shallower variant."""

BOTTLENECK_DEPTH = 50
FULL_SIZE = 64
"""Smallest side, in pixels, for which the paper's first layers are used; they divide the side by 4."""


class ResNet(Classifier):
    """Four stages of residual blocks; each stage halves the resolution and doubles the channels of the previous one.

    For images of 64 pixels or more, the first layers are a 7 × 7 convolution and a pooling, as in table 1 of the paper.
    With 3 channels and 1000 classes, the network has 11,689,512 parameters at depth 18 and 25,557,032 at depth 50. For
    smaller images, the first layer is a 3 × 3 convolution at full resolution (section 4.2). Depth 50 uses bottleneck
    blocks with the stride in the 3 × 3 convolution. Batch normalisation is over the global batch, so the result does
    not depend on the number of ranks.

    Args:
        image: shape of the input.
        classes: number of outputs.
        depth: number of layers: 10, 18, 34 or 50.
        width: number of channels of the first stage; 64 in the paper.
    """

    def __init__(self, image: ImageShape, classes: int, depth: int = 18, width: int = 64) -> None:
        super().__init__(image, classes)
        if min(image.height, image.width) >= FULL_SIZE:
            enter: list[nn.Module] = [nn.Conv2d(image.channels, width, 7, stride=2, padding=3, bias=False)]
            pool: list[nn.Module] = [nn.MaxPool2d(3, stride=2, padding=1)]
        else:
            enter, pool = [nn.Conv2d(image.channels, width, 3, padding=1, bias=False)], []
        layers = [*enter, GlobalBatchNorm(width), nn.ReLU(), *pool]
        block = _Bottleneck if depth >= BOTTLENECK_DEPTH else _Block
        channels = width
        for stage, count in enumerate(STAGES[depth]):
            for place in range(count):
                layers.append(block(channels, width * 2**stage, stride=2 if stage and place == 0 else 1))
                channels = width * 2**stage * block.expansion
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = nn.Linear(channels, classes)

    def embed(self, images: Images) -> Features:
        """See :class:`Classifier`."""
        return self.body(images)

    def forward(self, images: Images) -> Logits:
        """See :class:`Classifier`."""
        return self.last(self.embed(images))


class _Residual(nn.Module):
    """``ReLU(x + F(x))`` (eq. 1), with a projection of x if the shape changes (option B)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, branch: nn.Sequential) -> None:
        super().__init__()
        self.branch = branch
        out = width * self.expansion
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), GlobalBatchNorm(out))

    def forward(self, maps: Tensor) -> Tensor:
        return (self.shortcut(maps) + self.branch(maps)).relu()


class _Block(_Residual):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        branch = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False), GlobalBatchNorm(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), GlobalBatchNorm(width),
        )  # fmt: skip
        super().__init__(channels, width, stride, branch)


class _Bottleneck(_Residual):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        branch = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), GlobalBatchNorm(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), GlobalBatchNorm(width), nn.ReLU(),
            nn.Conv2d(width, width * 4, 1, bias=False), GlobalBatchNorm(width * 4),
        )  # fmt: skip
        super().__init__(channels, width, stride, branch)
