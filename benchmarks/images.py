"""Point clouds as in training: images, noise, and samples as from an early generator."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
"""Path of the images in Debian's package dataset-fashion-mnist."""


def images(path: Path, count: int) -> tuple[np.ndarray, str]:
    """Return images, (count, 784) float32 in [−1, 1], and their origin: an IDX file or, without it, random blobs."""
    rng = np.random.default_rng(0)
    if path.exists():
        with gzip.open(path) as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28 * 28)
        return pixels[rng.permutation(len(pixels))[:count]].astype(np.float32) / 127.5 - 1, "Fashion-MNIST"
    blobs = gaussian_filter(rng.standard_normal((count, 28, 28), dtype=np.float32), (0, 4, 4))
    return np.tanh(8 * blobs).reshape(count, -1), "synthetic blobs"


def noise(count: int, d: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, d), dtype=np.float32)


def blurred(pictures: np.ndarray, seed: int = 2) -> np.ndarray:
    """Return smoothed and slightly noisy copies of other pictures, as from an early generator."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(pictures[rng.permutation(len(pictures))].reshape(-1, 28, 28), (0, 2, 2))
    return (smooth + 0.05 * rng.standard_normal(smooth.shape)).reshape(len(pictures), -1).astype(np.float32)


def principal(clouds: tuple[np.ndarray, ...], reference: np.ndarray, d: int) -> tuple[np.ndarray, ...]:
    """Project clouds on the first d principal components of the reference."""
    mean = reference.mean(0)
    axes = np.linalg.svd(reference[:4096] - mean, full_matrices=False)[2][:d]
    return tuple(np.ascontiguousarray((cloud - mean) @ axes.T) for cloud in clouds)
