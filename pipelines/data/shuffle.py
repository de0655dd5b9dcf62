"""The order in which an epoch shows its images."""

from __future__ import annotations

import numpy as np


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n images, a pure function of its arguments.

    It sorts the raw output of PCG64 (O'Neill 2014). NumPy keeps the bit stream of a generator fixed between versions,
    but not what ``permutation`` makes of it: a run may thus resume under another NumPy.

    Args:
        n: number of images.
        seed: of the job, ≥ 0.
        epoch: number of passes before this one, ≥ 0.

    Returns:
        (n,) int64.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable")
