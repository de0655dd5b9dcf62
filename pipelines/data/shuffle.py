"""Order of the images of an epoch."""

from __future__ import annotations

import numpy as np


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of n images, as a pure function of its arguments.

    It sorts the raw output of PCG64 (O'Neill 2014). The bit stream of a NumPy generator is the same in all versions,
    unlike the result of ``permutation``, so a run may resume with another version of NumPy.

    Args:
        n: number of images.
        seed: seed of the job, ≥ 0.
        epoch: index of the epoch, ≥ 0.

    Returns:
        Permutation, (n,) int64.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")
