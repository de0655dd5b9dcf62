"""Randomness as a pure function of (seed, step, stream).

No generator is used for more than one step, so checkpoints need no generator state: a run resumed at step k draws the
same numbers as an uninterrupted run. Draws such as latent vectors are made for the whole global batch, so a run on four
ranks draws the same numbers as a run on one rank; only dropout draws separately on each rank.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derived_seed(seed: int, step: int, stream: str) -> int:
    """Derive a 63-bit seed from (seed, step, stream)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_generator(seed: int, step: int, stream: str) -> torch.Generator:
    """Create a CPU generator for one draw of one step."""
    return torch.Generator().manual_seed(derived_seed(seed, step, stream))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators, from which dropout draws, for one step of one rank."""
    torch.manual_seed(derived_seed(seed, step, f"rank {rank}"))


def normal_rows(keys: np.ndarray, width: int) -> torch.Tensor:
    """Draw standard normal vectors; each one depends only on its key.

    Args:
        keys: seeds of the vectors, (k,) uint32.
        width: dimension of the vectors.

    Returns:
        The vectors, (k, width) float32.
    """
    rows = torch.empty(len(keys), width)
    generator = torch.Generator()
    for row, key in zip(rows, keys.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(key))
    return rows
