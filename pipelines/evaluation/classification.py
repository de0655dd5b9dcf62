"""How well a classifier does on the held-out split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from pipelines.data.loader import Split
from pipelines.distributed import rank, sum_over_ranks, world_size
from pipelines.evaluation.figures import predictions_figure
from pipelines.models.bundle import to_float
from pipelines.models.network import Classifier

EXAMPLES = 16


@torch.inference_mode()
def accuracy(network: Classifier, split: Split, device: torch.device, batch: int = 1024) -> dict[str, float]:
    """Accuracy and mean cross-entropy over a split, which the ranks share out between them.

    Returns:
        ``accuracy`` and ``loss``, over all classes.
    """
    was_training = network.training
    network.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    mine = np.arange(rank(), len(split), world_size())
    for start in range(0, len(mine), batch):
        images, labels = split.take(mine[start : start + batch])
        logits = network(to_float(images.to(device)))
        labels = labels.to(device)
        totals[0] += float((logits.argmax(1) == labels).sum())
        totals[1] += float(F.cross_entropy(logits, labels, reduction="sum"))
    network.train(was_training)
    correct, loss = (sum_over_ranks(totals.to(device)) / len(split)).tolist()
    return {"accuracy": correct, "loss": loss}


@torch.inference_mode()
def predictions(network: Classifier, split: Split, classes: Sequence[str], device: torch.device) -> np.ndarray:
    """A picture of predictions on images spread evenly over a split, (h, w, 3) uint8."""
    was_training = network.training
    network.eval()
    chosen = np.linspace(0, len(split) - 1, min(EXAMPLES, len(split))).astype(np.int64)
    images, labels = split.take(chosen)
    probabilities = network(to_float(images.to(device))).softmax(1).cpu().numpy()
    network.train(was_training)
    return predictions_figure(images.numpy(), probabilities, classes, labels.numpy())
