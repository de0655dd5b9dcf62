"""Layers that double the side of feature maps."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.spec import Upsampling


def upsampled(kind: Upsampling, wide: int, narrow: int) -> list[nn.Module]:
    """Create layers that map (n, wide, h, w) to (n, narrow, 2h, 2w)."""
    if kind == "nearest":
        return [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(wide, narrow, 3, padding=1)]
    if kind == "transposed":
        return [nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)]
    return [FilteredConvTranspose(wide, narrow)]


class FilteredConvTranspose(nn.Module):
    """A transposed convolution, 3 × 3 with stride 2, followed by a sum over 2 × 2 neighbours.

    The kernels of even and odd pixels then have the same sum, so a constant map stays constant and no checkerboard
    appears, at initialisation or later (zero-order hold; Sugawara, Shiota & Kiya 2018, arXiv 1806.02658). The kernel is
    filtered instead of the map, at negligible cost.

    Args:
        wide: number of channels of the input.
        narrow: number of channels of the output.
    """

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        convolution = nn.ConvTranspose2d(wide, narrow, 3, stride=2)
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, maps: Float[Tensor, "n wide h w"]) -> Float[Tensor, "n narrow h2 w2"]:
        """Feature maps of twice the side."""
        kernel = F.pad(self.weight, (1, 1, 1, 1))
        kernel = kernel[..., 1:, :] + kernel[..., :-1, :]
        # Half the sum of four independent weights has the variance of one weight.
        kernel = (kernel[..., 1:] + kernel[..., :-1]) / 2
        return F.conv_transpose2d(maps, kernel, self.bias, stride=2, padding=1)
