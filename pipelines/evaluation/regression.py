"""How near a network is to the function that it approximates."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32

from pipelines.data.loader import Split
from pipelines.data.targets import TargetName, halves, target
from pipelines.evaluation.classification import spread
from pipelines.models.bundle import to_float
from pipelines.models.network import Classifier


@torch.inference_mode()
def approximation(
    network: Classifier, split: Split, name: TargetName, device: torch.device, most: int, batch: int = 1024
) -> Float32[np.ndarray, "n 4"]:
    """Where images lie, what the function is there and what the network says; by this rank alone.

    Args:
        network: of one output, in evaluation mode.
        split: the images.
        name: of the function, see :func:`pipelines.data.targets.target`.
        device: where the network is.
        most: images after which it is enough, spread evenly over the split.
        batch: images at a time.

    Returns:
        (n, 4): mean brightness of the left and of the right half, the function, the network's output.
    """
    was_training = network.training
    network.eval()
    chosen, rows = spread(split, most), []
    for start in range(0, len(chosen), batch):
        images = to_float(split.take(chosen[start : start + batch])[0].to(device))
        columns = (halves(images), target(images, name)[:, None], network(images))
        rows.append(torch.cat([column.float() for column in columns], 1).cpu())
    network.train(was_training)
    return torch.cat(rows).numpy()


def mean_squared_error(rows: Float32[np.ndarray, "n 4"]) -> float:
    """Mean squared distance between function and output of :func:`approximation`."""
    return float(np.square(rows[:, 3].astype(np.float64) - rows[:, 2]).mean())
