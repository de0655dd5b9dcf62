"""Networks with pretrained ImageNet weights, used as frozen feature extractors.

MobileNetV2 (Sandler et al. 2018, table 2) and EfficientNet-Lite0, which is EfficientNet-B0 (Tan & Le 2019, table 1)
without squeeze-and-excitation and with ReLU6, are the same chain of inverted residuals with different sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.models.network import Network

Pixels = UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]
ScaledImages = Float[Tensor, "b 3 {self.side} {self.side}"]
Features = Float[Tensor, "b {self.features}"]


class ImageNetNetwork(Network):
    """A network for colour images of a fixed size.

    Attributes:
        side: side of its square input images, in pixels.
        features: dimension of the input of its last layer.
    """

    side: int
    features: int

    def prepare(self, images: Pixels) -> ScaledImages:
        """Resize and normalise images: (b, c, h, w) in 0 … 255 → (b, 3, side, side)."""
        raise NotImplementedError

    def embed(self, images: ScaledImages) -> Features:
        """Input of the last layer, (b, features)."""
        raise NotImplementedError

    def forward(self, images: ScaledImages) -> Float[Tensor, "b classes"]:
        """Logits for the ImageNet classes."""
        raise NotImplementedError


def in_colour(images: Pixels) -> Float[Tensor, "b 3 h w"]:
    """Convert pixels to floats 0 … 255 with three channels."""
    return images.float().expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class BlockGroup:
    """Sequence of equal blocks, of which the first one may have a stride.

    Attributes:
        expansion: ratio of the inner channels of a block to its input channels.
        channels: number of output channels.
        blocks: number of blocks.
        stride: stride of the first block.
        kernel: side of the depthwise kernels.
    """

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int


MOBILENET_V2 = (
    BlockGroup(1, 16, 1, 1, 3), BlockGroup(6, 24, 2, 2, 3), BlockGroup(6, 32, 3, 2, 3), BlockGroup(6, 64, 4, 2, 3),
    BlockGroup(6, 96, 3, 1, 3), BlockGroup(6, 160, 3, 2, 3), BlockGroup(6, 320, 1, 1, 3),
)  # fmt: skip
EFFICIENTNET_LITE0 = (
    BlockGroup(1, 16, 1, 1, 3), BlockGroup(6, 24, 2, 2, 3), BlockGroup(6, 40, 2, 2, 5), BlockGroup(6, 80, 3, 2, 3),
    BlockGroup(6, 112, 3, 1, 5), BlockGroup(6, 192, 4, 2, 5), BlockGroup(6, 320, 1, 1, 3),
)  # fmt: skip
STEM, HEAD, CLASSES = 32, 1280, 1000


@dataclass(frozen=True)
class Convention:
    """Conventions of the framework in which weights were trained.

    Attributes:
        mean, std: mean and standard deviation of the channels, for pixels 0 … 255.
        epsilon: constant that batch normalisation adds to variances.
        ends_first: whether strided convolutions with odd padding put the extra pixel at the far edges, like "same"
            padding in TensorFlow, or pad all edges equally.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    epsilon: float
    ends_first: bool


TORCH = Convention((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 1e-5, ends_first=False)
TENSORFLOW = Convention((127.0, 127.0, 127.0), (128.0, 128.0, 128.0), 1e-3, ends_first=True)


class ConvNorm(nn.Module):
    """Convolution and batch normalisation, without activation."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, groups: int, convention: Convention) -> None:
        super().__init__()
        padding = 0 if convention.ends_first else kernel // 2
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=convention.epsilon)
        self._overlap = kernel - stride if convention.ends_first else 0

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h2 w2"]:
        if self._overlap > 0:
            # The sides of all feature maps are multiples of the stride.
            start, end = self._overlap // 2, self._overlap - self._overlap // 2
            images = F.pad(images, (start, end, start, end))
        return self.norm(self.conv(images))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection; the input is added if the shapes match."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int, how: Convention) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = ConvNorm(channels, inner, 1, 1, 1, how) if expansion > 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel, stride, inner, how)
        self.project = ConvNorm(inner, out, 1, 1, 1, how)
        self._adds = stride == 1 and channels == out

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h2 w2"]:
        inner = images if self.expand is None else F.relu6(self.expand(images))
        found = self.project(F.relu6(self.depthwise(inner)))
        return images + found if self._adds else found


class InvertedResiduals(ImageNetNetwork):
    """A chain of inverted residuals between two convolutions.

    Args:
        stages: stages of the chain.
        convention: convention of the weights.
    """

    side = 224
    features = HEAD

    def __init__(self, stages: tuple[BlockGroup, ...], convention: Convention) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, 2, 1, convention)
        blocks: list[InvertedResidual] = []
        channels = STEM
        for stage in stages:
            for place in range(stage.blocks):
                stride = stage.stride if place == 0 else 1
                blocks.append(
                    InvertedResidual(channels, stage.channels, stage.expansion, stage.kernel, stride, convention)
                )
                channels = stage.channels
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvNorm(channels, HEAD, 1, 1, 1, convention)
        self.last = nn.Linear(HEAD, CLASSES)
        self._convention = convention

    def prepare(self, images: Pixels) -> ScaledImages:
        """See :meth:`ImageNetNetwork.prepare`."""
        # Antialiasing averages over pixels of large images and has no effect when small images are enlarged.
        size = (self.side, self.side)
        resized = F.interpolate(in_colour(images), size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (
            torch.tensor(numbers, device=images.device).view(3, 1, 1)
            for numbers in (self._convention.mean, self._convention.std)
        )
        return (resized - mean) / std

    def embed(self, images: ScaledImages) -> Features:
        """See :meth:`ImageNetNetwork.embed`."""
        images = F.relu6(self.stem(images))
        for block in self.blocks:
            images = block(images)
        return F.relu6(self.head(images)).mean((2, 3))

    def forward(self, images: ScaledImages) -> Float[Tensor, "b classes"]:
        """See :meth:`ImageNetNetwork.forward`."""
        return self.last(self.embed(images))


def mobilenet_v2(weights: Mapping[str, Tensor]) -> InvertedResiduals:
    """Build MobileNetV2 from weights with torchvision's parameter names.

    Raises:
        RuntimeError: a weight is missing, unexpected or of another shape.
    """
    network = InvertedResiduals(MOBILENET_V2, TORCH)
    names = {"stem.conv": "features.0.0", "stem.norm": "features.0.1", "last": "classifier.1"}
    for place, block in enumerate(network.blocks):
        theirs = f"features.{place + 1}.conv"
        units = iter(range(3))
        for name in ("expand", "depthwise"):
            if getattr(block, name) is not None:
                unit = next(units)
                names |= {f"blocks.{place}.{name}.{part}": f"{theirs}.{unit}.{k}" for k, part in enumerate(_PARTS)}
        unit = next(units)  # the parts of the projection are at the same level as the units before it
        names |= {f"blocks.{place}.project.{part}": f"{theirs}.{unit + k}" for k, part in enumerate(_PARTS)}
    head = f"features.{len(network.blocks) + 1}"
    names |= {f"head.{part}": f"{head}.{k}" for k, part in enumerate(_PARTS)}
    return _loaded(network, weights, names)


def efficientnet_lite0(weights: Mapping[str, Tensor]) -> InvertedResiduals:
    """Build EfficientNet-Lite0 from weights with the names of the ``efficientnet_lite_pytorch`` package.

    Raises:
        RuntimeError: a weight is missing, unexpected or of another shape.
    """
    network = InvertedResiduals(EFFICIENTNET_LITE0, TENSORFLOW)
    names = {"stem.conv": "_conv_stem", "stem.norm": "_bn0", "last": "_fc"}
    names |= {"head.conv": "_conv_head", "head.norm": "_bn1"}
    for place, block in enumerate(network.blocks):
        for number, name in enumerate(("expand", "depthwise", "project")):
            if getattr(block, name) is not None:
                ours, theirs = f"blocks.{place}.{name}", f"_blocks.{place}"
                names |= {f"{ours}.conv": f"{theirs}._{name}_conv", f"{ours}.norm": f"{theirs}._bn{number}"}
    return _loaded(network, weights, names)


_PARTS = ("conv", "norm")


def _loaded(network: InvertedResiduals, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> InvertedResiduals:
    """Load weights with other names into a network, and freeze it."""
    ours = {theirs: name for name, theirs in names.items()}
    network.load_state_dict(dict(_renamed(weights, ours)))
    return network.eval().requires_grad_(False)


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in weights.items():
        module, _, leaf = key.rpartition(".")
        # Unknown names are kept, so that load_state_dict reports them as unexpected.
        yield f"{names.get(module, module)}.{leaf}", tensor
