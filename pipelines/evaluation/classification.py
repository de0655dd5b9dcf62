"""Evaluation of classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch.nn import functional as F

from pipelines.data.loader import Split
from pipelines.distributed import rank, sum_over_ranks, world_size
from pipelines.evaluation.figures import predictions_figure
from pipelines.models.bundle import to_float
from pipelines.models.network import Classifier

EXAMPLES = 16
BINS = 15
"""Number of confidence bins of the calibration error."""


@torch.inference_mode()
def accuracy(
    network: Classifier, split: Split, device: torch.device, batch: int = 1024, most: int | None = None
) -> dict[str, float]:
    """Compute accuracy and mean cross-entropy over a split; each rank processes a part of the images.

    Args:
        network: classifier, which is evaluated in evaluation mode.
        split: split of the images.
        device: device of the network.
        batch: number of images per forward pass.
        most: largest number of images, spread evenly over the split; None for all.

    Returns:
        ``accuracy`` and ``loss``, over all classes.
    """
    was_training = network.training
    network.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    chosen = spread(split, most)
    mine = chosen[rank() :: world_size()]
    for start in range(0, len(mine), batch):
        images, labels = split.take(mine[start : start + batch])
        logits = network(to_float(images.to(device)))
        labels = labels.to(device)
        totals[0] += float((logits.argmax(1) == labels).sum())
        totals[1] += float(F.cross_entropy(logits, labels, reduction="sum"))
    network.train(was_training)
    correct, loss = (sum_over_ranks(totals.to(device)) / len(chosen)).tolist()
    return {"accuracy": correct, "loss": loss}


def spread(split: Split, most: int | None = None) -> Int64[np.ndarray, " k"]:
    """Indices of at most ``most`` images, spread evenly over a split."""
    count = len(split) if most is None else min(most, len(split))
    return np.linspace(0, len(split) - 1, count).round().astype(np.int64)


@torch.inference_mode()
def probabilities(
    network: Classifier, split: Split, device: torch.device, batch: int = 1024
) -> tuple[Float32[np.ndarray, "n classes"], Int64[np.ndarray, " n"]]:
    """Compute class probabilities and labels of all images of a split, on this rank only."""
    was_training = network.training
    network.eval()
    rows, labels = [], []
    for start in range(0, len(split), batch):
        images, those = split.take(np.arange(start, min(start + batch, len(split))))
        rows.append(network(to_float(images.to(device))).softmax(1).cpu())
        labels.append(those)
    network.train(was_training)
    return torch.cat(rows).numpy(), torch.cat(labels).numpy()


def calibration(
    rows: Float32[np.ndarray, "n classes"], labels: Int64[np.ndarray, " n"], bins: int = BINS
) -> tuple[float, Float64[np.ndarray, "{bins} 3"]]:
    """Compute the expected calibration error (Guo et al. 2017, eq. 3) and its bins.

    Predictions are sorted into bins of equal width by the probability of the predicted class.

    Returns:
        The mean over predictions of |accuracy − confidence| of their bins; and (bins, 3): mean confidence, accuracy
        and fraction of all predictions of each bin, 0 where it is empty.
    """
    confidence, right = rows.max(1).astype(np.float64), rows.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    means = [
        np.bincount(bin_of, weights=values, minlength=bins) / np.maximum(counts, 1) for values in (confidence, right)
    ]
    table = np.stack([*means, counts / len(labels)], axis=1)
    return float((np.abs(table[:, 1] - table[:, 0]) * table[:, 2]).sum()), table


def confusion(
    rows: Float32[np.ndarray, "n classes"], labels: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, "classes classes"]:
    """Confusion matrix: number of images by true class (row) and predicted class (column)."""
    classes = rows.shape[1]
    return np.bincount(labels * classes + rows.argmax(1), minlength=classes**2).reshape(classes, classes)


def worst(rows: Float32[np.ndarray, "n classes"], labels: Int64[np.ndarray, " n"], count: int) -> np.ndarray:
    """Indices of the images whose true class has the lowest probability, in increasing order."""
    return np.argsort(rows[np.arange(len(labels)), labels], kind="stable")[:count]


@torch.inference_mode()
def predictions(network: Classifier, split: Split, classes: Sequence[str], device: torch.device) -> np.ndarray:
    """Draw predictions for images spread evenly over a split, (h, w, 3) uint8."""
    was_training = network.training
    network.eval()
    chosen = np.linspace(0, len(split) - 1, min(EXAMPLES, len(split))).astype(np.int64)
    images, labels = split.take(chosen)
    probabilities = network(to_float(images.to(device))).softmax(1).cpu().numpy()
    network.train(was_training)
    return predictions_figure(images.numpy(), probabilities, classes, labels.numpy())
