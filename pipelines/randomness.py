"""Randomness as a pure function of (seed, step, stream).

Nothing draws from a generator that lives across steps. So there is no generator state to save: a run resumed at step k
draws what the uninterrupted one drew. Latent vectors and mirrored images are drawn for the whole global batch, so that
a run on four ranks draws what a run on one rank did; dropout alone draws for each rank by itself.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derived_seed(seed: int, step: int, stream: str) -> int:
    """A 63-bit seed, independent for each (seed, step, stream)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_generator(seed: int, step: int, stream: str) -> torch.Generator:
    """A CPU generator for one draw of one step."""
    return torch.Generator().manual_seed(derived_seed(seed, step, stream))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators for one step of one rank: dropout draws from them."""
    torch.manual_seed(derived_seed(seed, step, f"rank {rank}"))


def normal_rows(keys: np.ndarray, width: int) -> torch.Tensor:
    """Standard normal vectors, each a function of its own key alone.

    Args:
        keys: (k,) uint32.
        width: of each vector.

    Returns:
        (k, width) float32.
    """
    rows = torch.empty(len(keys), width)
    generator = torch.Generator()
    for row, key in zip(rows, keys.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(key))
    return rows
