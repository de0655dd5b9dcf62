"""Evaluation of auto-encoders on images with hidden patches."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8

from pipelines.data.loader import Split
from pipelines.data.patches import hide, patch_count
from pipelines.distributed import gather_parts
from pipelines.evaluation.figures import TILE, image_grid
from pipelines.models.autoencoder import AutoEncoder
from pipelines.models.bundle import to_float, to_uint8
from pipelines.randomness import step_generator
from pipelines.spec import ReconstructionSpec

BATCH = 256
"""Number of images per forward pass."""

MOST = 4096
"""Largest number of images, spread evenly over the split, on which errors are computed."""

SHOWN = 16
"""Number of images in the picture."""


@torch.inference_mode()
def reconstruction(
    network: AutoEncoder, split: Split, spec: ReconstructionSpec, seed: int, device: torch.device
) -> tuple[dict[str, float], UInt8[np.ndarray, ...]]:
    """Compute errors on held-out images, and draw a picture. Collective: each rank processes a part of the images.

    Args:
        network: auto-encoder.
        split: split of the images.
        spec: size and fraction of hidden patches; the same patches are hidden at every call.
        seed: seed of the hidden patches.
        device: device of the network.

    Returns:
        Mean squared errors of pixels in [−1, 1]: ``reconstruction_error`` for whole images as input, ``hidden_error``
        for images with hidden patches as input, both over all pixels; and a grid whose columns show input,
        reconstruction and image.
    """
    was_training = network.training
    network.eval()
    chosen = np.linspace(0, len(split) - 1, min(MOST, len(split))).astype(np.int64)
    draws = torch.randn(
        len(chosen), patch_count(network.image, spec.patch), generator=step_generator(seed, 0, "hidden patches")
    )

    def seen(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        images = to_float(split.take(chosen[part])[0].to(device))
        return images, hide(images, draws[part].to(device), spec.hidden, spec.patch)

    def errors(part: slice) -> list[torch.Tensor]:
        rows = []
        for start in range(part.start, part.stop, BATCH):
            images, shown = seen(slice(start, min(start + BATCH, part.stop)))
            rows.append(
                torch.stack([(network(one) - images).square().mean((1, 2, 3)) for one in (images, shown)], dim=1)
            )
        return [torch.cat(rows)]

    whole, hidden = gather_parts(len(chosen), BATCH, errors)[0].double().mean(0).tolist()
    images, shown = seen(slice(0, SHOWN))
    rows = to_uint8(torch.cat([shown, network(shown), images])).cpu().numpy()
    network.train(was_training)
    return {"reconstruction_error": whole, "hidden_error": hidden}, image_grid(rows, columns=len(images), tile=TILE)
