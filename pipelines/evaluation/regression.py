"""Evaluation of approximations of a continuous function."""

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
    """Evaluate a function and its approximation on images, on this rank only.

    Args:
        network: network with one output, which is evaluated in evaluation mode.
        split: split of the images.
        name: name of the function, see :func:`pipelines.data.targets.target`.
        device: device of the network.
        most: largest number of images, spread evenly over the split.
        batch: number of images per forward pass.

    Returns:
        Mean brightness of the left and the right half, value of the function and output of the network, (n, 4).
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
