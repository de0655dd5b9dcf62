"""Inception-v3 (Szegedy et al. 2016), whose features are the standard for the evaluation of generators.

Two kinds of weights are supported, both with torchvision's parameter names. The weights of the TensorFlow graph of
2015-12-05, with 1008 outputs, are those of published Fréchet inception distances; in this graph average pooling
excludes the padding, and the last block uses max pooling. The weights of torchvision, with 1000 outputs, follow the
blocks of the paper. The number of outputs determines the kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.models.imagenet import CLASSES, Features, ImageNetNetwork, Pixels, ScaledImages, in_colour

GRAPH_OUTPUTS = 1008
"""Number of outputs of the TensorFlow graph: the ImageNet classes and eight unused ones."""

Pool = Literal["average", "padless average", "maximum", "strided maximum"]


class ConvUnit(NamedTuple):
    """Unit of a chain: name, output channels, kernel (side, or height and width) and stride."""

    name: str
    out: int
    kernel: int | tuple[int, int]
    stride: int = 1


Chain = Sequence[tuple[ConvUnit, ...]]
"""Sequence of steps; the units of one step have the same input, and their outputs are concatenated."""


def _chain(*steps: ConvUnit) -> Chain:
    return [(step,) for step in steps]


class ConvNormReLU(nn.Module):
    """Convolution, batch normalisation and ReLU; by default padded to keep the size at a stride of 1."""

    def __init__(
        self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, pads: bool | None = None
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads = stride == 1 if pads is None else pads
        padding = (height // 2, width // 2) if pads else 0
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h2 w2"]:
        return F.relu(self.bn(self.conv(images)))


class Mixed(nn.Module):
    """Parallel chains and a pooling branch, concatenated along the channels."""

    def __init__(self, channels: int, chains: Sequence[Chain], pool: Pool, pooled: int | None) -> None:
        super().__init__()
        self._chains: list[list[tuple[str, ...]]] = []
        self.out = pooled or channels
        for chain in chains:
            width = channels
            for steps in chain:
                for step in steps:
                    self.add_module(step.name, ConvNormReLU(width, step.out, step.kernel, step.stride))
                width = sum(step.out for step in steps)
            self._chains.append([tuple(step.name for step in steps) for steps in chain])
            self.out += width
        self._pool = pool
        self.branch_pool = None if pooled is None else ConvNormReLU(channels, pooled, 1)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h2 w2"]:
        found = []
        for chain in self._chains:
            state = images
            for names in chain:
                state = torch.cat([self.get_submodule(name)(state) for name in names], 1)
            found.append(state)
        pooled = _pooled(images, self._pool)
        return torch.cat([*found, pooled if self.branch_pool is None else self.branch_pool(pooled)], 1)


def _pooled(images: Tensor, pool: Pool) -> Tensor:
    match pool:
        case "strided maximum":
            return F.max_pool2d(images, 3, 2)
        case "maximum":
            return F.max_pool2d(images, 3, 1, 1)
    return F.avg_pool2d(images, 3, 1, 1, count_include_pad=pool == "average")


def _fives() -> list[Chain]:
    """Figure 5 of the paper."""
    return [
        _chain(ConvUnit("branch1x1", 64, 1)),
        _chain(ConvUnit("branch5x5_1", 48, 1), ConvUnit("branch5x5_2", 64, 5)),
        _chain(ConvUnit("branch3x3dbl_1", 64, 1), ConvUnit("branch3x3dbl_2", 96, 3), ConvUnit("branch3x3dbl_3", 96, 3)),
    ]


def _sevens(inner: int) -> list[Chain]:
    """Figure 6 of the paper with n = 7."""
    kernels = ((7, 1), (1, 7), (7, 1), (1, 7))
    widths = (inner, inner, inner, 192)
    long = [
        ConvUnit(f"branch7x7dbl_{place}", width, kernel)
        for place, (width, kernel) in enumerate(zip(widths, kernels, strict=True), start=2)
    ]
    return [
        _chain(ConvUnit("branch1x1", 192, 1)),
        _chain(
            ConvUnit("branch7x7_1", inner, 1),
            ConvUnit("branch7x7_2", inner, (1, 7)),
            ConvUnit("branch7x7_3", 192, (7, 1)),
        ),
        _chain(ConvUnit("branch7x7dbl_1", inner, 1), *long),
    ]


def _wide() -> list[Chain]:
    """Figure 7 of the paper."""
    fan, double = (
        (ConvUnit(f"{name}a", 384, (1, 3)), ConvUnit(f"{name}b", 384, (3, 1)))
        for name in ("branch3x3_2", "branch3x3dbl_3")
    )
    return [
        _chain(ConvUnit("branch1x1", 320, 1)),
        [*_chain(ConvUnit("branch3x3_1", 384, 1)), fan],
        [*_chain(ConvUnit("branch3x3dbl_1", 448, 1), ConvUnit("branch3x3dbl_2", 384, 3)), double],
    ]


def _to_17() -> list[Chain]:
    """Figure 10 of the paper, from 35 × 35 to 17 × 17 pixels."""
    return [
        _chain(ConvUnit("branch3x3", 384, 3, 2)),
        _chain(
            ConvUnit("branch3x3dbl_1", 64, 1), ConvUnit("branch3x3dbl_2", 96, 3), ConvUnit("branch3x3dbl_3", 96, 3, 2)
        ),
    ]


def _to_8() -> list[Chain]:
    """From 17 × 17 to 8 × 8 pixels."""
    flat = ConvUnit("branch7x7x3_2", 192, (1, 7)), ConvUnit("branch7x7x3_3", 192, (7, 1))
    return [
        _chain(ConvUnit("branch3x3_1", 192, 1), ConvUnit("branch3x3_2", 320, 3, 2)),
        _chain(ConvUnit("branch7x7x3_1", 192, 1), *flat, ConvUnit("branch7x7x3_4", 192, 3, 2)),
    ]


class InceptionV3(ImageNetNetwork):
    """Inception-v3 without its auxiliary classifier.

    Args:
        outputs: number of outputs; :data:`GRAPH_OUTPUTS` selects the TensorFlow graph.
    """

    side = 299
    features = 2048

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self._is_graph = outputs == GRAPH_OUTPUTS
        average: Pool = "padless average" if self._is_graph else "average"
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3, pads=False)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3, pads=False)
        last: Pool = "maximum" if self._is_graph else "average"
        blocks: dict[str, tuple[list[Chain], Pool, int | None]] = {
            "5b": (_fives(), average, 32),
            "5c": (_fives(), average, 64),
            "5d": (_fives(), average, 64),
            "6a": (_to_17(), "strided maximum", None),
            "6b": (_sevens(128), average, 192),
            "6c": (_sevens(160), average, 192),
            "6d": (_sevens(160), average, 192),
            "6e": (_sevens(192), average, 192),
            "7a": (_to_8(), "strided maximum", None),
            "7b": (_wide(), average, 192),
            "7c": (_wide(), last, 192),
        }
        self._mixed = [f"Mixed_{name}" for name in blocks]
        channels = 192
        for name, described in zip(self._mixed, blocks.values(), strict=True):
            block = Mixed(channels, *described)
            self.add_module(name, block)
            channels = block.out
        self.fc = nn.Linear(channels, outputs)

    def prepare(self, images: Pixels) -> ScaledImages:
        """See :meth:`~pipelines.models.imagenet.ImageNetNetwork.prepare`."""
        pixels = in_colour(images)
        if self._is_graph:
            return (resized_from_corners(pixels, self.side) - 128) / 128
        size = (self.side, self.side)
        return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True) / 127.5 - 1

    def embed(self, images: ScaledImages) -> Features:
        """See :meth:`~pipelines.models.imagenet.ImageNetNetwork.embed`."""
        images = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        images = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(images, 3, 2)))
        images = F.max_pool2d(images, 3, 2)
        for name in self._mixed:
            images = self.get_submodule(name)(images)
        return images.mean((2, 3))

    def forward(self, images: ScaledImages) -> Float[Tensor, "b classes"]:
        """See :meth:`~pipelines.models.imagenet.ImageNetNetwork.forward`."""
        return self.fc(self.embed(images))


def inception_v3(weights: Mapping[str, Tensor]) -> InceptionV3:
    """Build Inception-v3 from weights with torchvision's names; those of the auxiliary classifier are ignored.

    Raises:
        RuntimeError: a weight is missing, unexpected or of another shape.
    """
    outputs = CLASSES if "fc.bias" in weights and weights["fc.bias"].numel() == CLASSES else GRAPH_OUTPUTS
    network = InceptionV3(outputs)
    network.load_state_dict({name: w for name, w in weights.items() if not name.startswith("AuxLogits.")})
    return network.eval().requires_grad_(False)


def resized_from_corners(images: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "b c {side} {side}"]:
    """Resize images bilinearly as TensorFlow graphs of 2015 do: pixel k of the result is at k · h / side.

    Published distances depend on this convention (Parmar, Zhang & Zhu 2022, section 3).
    """
    for dim in (2, 3):
        size = images.shape[dim]
        places = torch.arange(side, device=images.device) * (size / side)
        low = places.long()
        weights = (places - low).view((-1, 1) if dim == 2 else (-1,))
        images = torch.lerp(
            images.index_select(dim, low), images.index_select(dim, (low + 1).clamp_max(size - 1)), weights
        )
    return images
