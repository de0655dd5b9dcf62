"""How far one set of features is from another. All functions take (n, d) features of real and of generated images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

Features = Float[Tensor, "n d"]
Others = Float[Tensor, "m d"]

BLOCK = 1024
"""Rows of a distance matrix that are held at once."""


def frechet_distance(real: Features, generated: Others) -> float:
    """``‖μ − ν‖² + tr(Σ + Τ − 2 (Σ Τ)^½)``: the 2-Wasserstein distance, squared, of Gaussians fitted to both sets.

    Heusel et al. 2017, eq. 6 (there of Inception's features, as FID). The trace of the root is the sum of the roots
    of the eigenvalues of ``Σ^½ Τ Σ^½``, which is symmetric, so that a singular covariance does no harm.

    Raises:
        ValueError: fewer than 2 rows on a side.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError("a covariance takes 2 rows")
    (mean, covariance), (other_mean, other_covariance) = (_moments(rows) for rows in (real, generated))
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    gap = (mean - other_mean).square().sum()
    return float(gap + covariance.trace() + other_covariance.trace() - 2 * cross)


def kernel_distance(real: Features, generated: Others) -> float:
    """The squared maximum mean discrepancy for the kernel ``(⟨x, y⟩ / d + 1)³``, unbiased.

    Bińkowski et al. 2018, section 4 (there of Inception's features, as KID), over all rows in place of random subsets
    of them; it may come out below 0.

    Raises:
        ValueError: fewer than 2 rows on a side.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError("an unbiased estimate takes 2 rows")
    real, generated = real.double(), generated.double()
    return _mean_kernel(real, real) + _mean_kernel(generated, generated) - 2 * _mean_kernel(real, generated)


def precision_recall(real: Features, generated: Others, neighbours: int = 3) -> tuple[float, float]:
    """Precision, the share of generated features among the real ones, and recall, the reverse.

    A feature is among others when it lies within the distance of one of them to its k-th nearest neighbour of its own
    set (Kynkäänniemi et al. 2019, eq. 1 and 2, k = 3).
    """
    precision = _inside(generated, real, _radii(real, neighbours)).any(1)
    recall = _inside(real, generated, _radii(generated, neighbours)).any(1)
    return float(precision.double().mean()), float(recall.double().mean())


def density_coverage(real: Features, generated: Others, neighbours: int = 5) -> tuple[float, float]:
    """Density, how many real neighbourhoods hold a generated feature, over k; coverage, how many hold one at all.

    Naeem et al. 2020, eq. 4 and 5 with k = 5: unlike precision and recall they are not moved by single outliers.
    """
    inside = _inside(generated, real, _radii(real, neighbours))
    return float(inside.sum() / (neighbours * len(generated))), float(inside.any(0).double().mean())


def nearest(queries: Features, points: Others, count: int) -> Tensor:
    """The nearest points to each query, (n, count) int64, the nearest first."""
    return torch.cat([found.topk(count, largest=False).indices for found in _distances(queries, points)])


def _moments(rows: Features) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
    return rows.double().mean(0), torch.cov(rows.double().T).reshape(rows.shape[1], rows.shape[1])


def _mean_kernel(rows: Features, others: Others) -> float:
    same = rows is others
    total = 0.0
    for block in rows.split(BLOCK):
        total += float((block @ others.T / rows.shape[1] + 1).pow_(3).sum())
    if not same:
        return total / (len(rows) * len(others))
    own = float((rows.square().sum(1) / rows.shape[1] + 1).pow_(3).sum())
    return (total - own) / (len(rows) * (len(rows) - 1))


def _radii(rows: Features, neighbours: int) -> Float[Tensor, " n"]:
    """Distance of each row to its k-th nearest other."""
    if len(rows) <= neighbours:
        raise ValueError(f"{len(rows)} rows have no {neighbours} neighbours each")
    # The nearest row is the row itself.
    return torch.cat([found.topk(neighbours + 1, largest=False).values[:, -1] for found in _distances(rows, rows)])


def _inside(rows: Features, centres: Others, radii: Float[Tensor, " m"]) -> Tensor:
    """Which rows lie in the ball of which centre, (n, m) bool."""
    return torch.cat([found <= radii for found in _distances(rows, centres)])


def _distances(rows: Features, others: Others) -> Iterator[Float64[Tensor, "k m"]]:
    """Distances by blocks of rows: in float64 about the mean, because features are often far from the origin."""
    centre = others.double().mean(0)
    others = others.double() - centre
    for block in rows.split(BLOCK):
        yield torch.cdist(block.double() - centre, others)
