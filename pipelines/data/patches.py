"""Images with hidden patches."""

from __future__ import annotations

from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from pipelines.shape import ImageShape


def patch_count(image: ImageShape, side: int) -> int:
    """Number of square patches of an image, including partial ones at the far edges."""
    return -(-image.height // side) * -(-image.width // side)


def hide(
    images: Float32[Tensor, "k c h w"], draws: Float[Tensor, "k patches"], fraction: float, side: int
) -> Float32[Tensor, "k c h w"]:
    """Replace the patches with the largest draws by grey, 0.

    Args:
        images: images in [−1, 1].
        draws: one number per patch, row by row.
        fraction: fraction of the patches that are hidden.
        side: side of a patch, in pixels.
    """
    height, width = images.shape[2:]
    order = draws.argsort(dim=1, descending=True).argsort(dim=1)
    shown = (order >= round(fraction * draws.shape[1])).to(images.dtype).view(len(draws), 1, -(-height // side), -1)
    return images * F.interpolate(shown, scale_factor=side, mode="nearest")[..., :height, :width]
