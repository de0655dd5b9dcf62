"""Residual networks (He et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from pipelines.models.network import Classifier, Features, Images, Logits
from pipelines.models.normalisation import GlobalBatchNorm
from pipelines.shape import ImageShape

STAGES = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Blocks in each stage by depth: the paper's table 1, and one shallower."""

BOTTLENECK_DEPTH = 50
FULL_SIZE = 64
"""Side in pixels from which images pass through the paper's first layers, which divide it by 4."""


class ResNet(Classifier):
    """Four stages of residual blocks, each at half the resolution of the one before and twice its channels.

    Images of 64 pixels and more enter as in the paper, by a convolution of 7 × 7 and a pooling (table 1): with 3
    channels and 1000 classes, 11,689,512 parameters at depth 18 and 25,557,032 at depth 50. Smaller ones enter by a
    convolution of 3 × 3 at full resolution (section 4.2). Blocks of depth 50 are bottlenecks, whose stride is at the
    convolution of 3 × 3. Normalised over the global batch, so that it means the same on any number of ranks.

    Args:
        image: shape of the input.
        classes: number of outputs.
        depth: 10, 18, 34 or 50 layers.
        width: channels of the first stage; 64 in the paper.
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
    """``ReLU(x + F(x))`` (eq. 1); where the shape changes, x is projected (option B)."""

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
