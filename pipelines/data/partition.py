"""Assignment of images to global batches and ranks, as pure functions.

The *sample stream* is the concatenation of all epochs' orders. Global batch k takes the positions
``k·batch … (k + 1)·batch − 1``, which may straddle two epochs: each image is seen once an epoch, none is dropped and
none repeated to fill up. The stream knows nothing of ranks, so a run may resume at any step on any number of them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pipelines.data.shuffle import epoch_order


def batch_indices(n: int, seed: int, batch: int, step: int) -> np.ndarray:
    """Indices of the images of a global batch.

    Args:
        n: number of images in the split, ≥ 1.
        seed: seed of the job.
        batch: size of the global batch, ≥ 1.
        step: index of the global batch, ≥ 0.

    Returns:
        Indices, (batch,) int64 in 0 … n − 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if n < 1 or batch < 1 or step < 0:
        raise ValueError(f"n ≥ 1, batch ≥ 1 and step ≥ 0 expected; received n={n}, batch={batch}, step={step}")
    start, stop = step * batch, (step + 1) * batch
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        first = epoch * n
        parts.append(_kept_order(n, seed, epoch)[max(start - first, 0) : stop - first])
    return np.concatenate(parts)


def rank_slice(batch: int, rank: int, world: int) -> slice:
    """Contiguous share of a global batch of one rank; the sizes of shares differ by at most one image.

    Args:
        batch: size of the global batch.
        rank: index of the rank, 0 … world − 1.
        world: number of ranks.

    Raises:
        ValueError: the rank is out of range.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank 0 to {world - 1} expected; received {rank}")
    return slice(batch * rank // world, batch * (rank + 1) // world)


@lru_cache(maxsize=4)
def _kept_order(n: int, seed: int, epoch: int) -> np.ndarray:
    # Cached, because sorting a million keys takes a large part of a second: fine per epoch, too slow per step.
    order = epoch_order(n, seed, epoch)
    order.flags.writeable = False
    return order
