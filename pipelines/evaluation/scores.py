"""How far one set of features is from another. All functions take (n, d) features of real and of generated images.

Every rank calls them with the same features. What is computed row by row is shared between the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pipelines.distributed import gather_parts, sum_over_ranks

Features = Float[Tensor, "n d"]
Others = Float[Tensor, "m d"]

BLOCK = 64
"""Rows of a matrix between two sets that are held at once: some MiB, which the allocator takes again for the next ones
where it would hand larger blocks back to the system each time."""

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
"""Of the papers: the neighbour that a row's neighbourhood reaches to."""


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


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """Features, and how far it is from each to its nearest neighbours of the same set.

    Attributes:
        rows: (n, d).
        radii: by k, the distance of each row to its k-th nearest other, (n,) float64.
    """

    rows: Features
    radii: dict[int, Float64[Tensor, " n"]]

    @classmethod
    def of(cls, rows: Features, *neighbours: int) -> Neighbourhoods:
        """Of each of those numbers of neighbours.

        Raises:
            ValueError: there are not so many.
        """
        if len(rows) <= max(neighbours):
            raise ValueError(f"{len(rows)} rows have no {max(neighbours)} neighbours each")

        # The nearest row is the row itself.
        count = max(neighbours) + 1
        found = _by_distances(rows, rows, lambda found, _: found.topk(count, largest=False).values)
        return cls(rows, {k: found[:, k] for k in neighbours})


def neighbourhood_scores(real: Neighbourhoods, generated: Others) -> dict[str, float]:
    """``precision``, ``recall``, ``density`` and ``coverage``.

    Precision is the fraction of generated features among the real ones, recall the reverse: a feature is among others
    when it lies within the distance of one of them to its k-th nearest neighbour of its own set (Kynkäänniemi et al.
    2019, eq. 1 and 2, k = 3). Density counts the real neighbourhoods that hold a generated feature, over k; coverage is
    the fraction of them that hold one (Naeem et al. 2020, eq. 4 and 5, k = 5): single outliers do not move these.

    Args:
        real: with both numbers of neighbours.
        generated: (m, d).

    Raises:
        ValueError: fewer generated features than neighbours.
    """
    reach = Neighbourhoods.of(generated, PRECISION_NEIGHBOURS).radii[PRECISION_NEIGHBOURS]
    narrow, wide = (real.radii[k][:, None] for k in (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS))
    hits = torch.zeros(len(generated), dtype=torch.int64, device=generated.device)

    def of_real(found: Tensor, rows: slice) -> Tensor:
        hits.add_((found <= narrow[rows]).sum(0))
        return torch.stack([(found <= reach).any(1).long(), (found <= wide[rows]).sum(1)], 1)

    recalled, held = _by_distances(real.rows, generated, of_real).unbind(1)
    return {
        "precision": float((sum_over_ranks(hits) > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(held.sum() / (DENSITY_NEIGHBOURS * len(generated))),
        "coverage": float((held > 0).double().mean()),
    }


def nearest(queries: Features, points: Others, count: int) -> Tensor:
    """The nearest points to each query, (n, count) int64, the nearest first."""
    return _by_distances(queries, points, lambda found, _: found.topk(count, largest=False).indices)


def _moments(rows: Features) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
    return rows.double().mean(0), torch.cov(rows.double().T).reshape(rows.shape[1], rows.shape[1])


def _mean_kernel(rows: Features, others: Others) -> float:
    def kernel(block: Tensor, _: slice) -> Tensor:
        base = (block @ others.T).div_(rows.shape[1]).add_(1)
        return base.square().mul_(base).sum(1)

    total = _by_blocks(rows, kernel).sum()
    if rows is not others:
        return float(total / (len(rows) * len(others)))
    own = (rows.square().sum(1) / rows.shape[1] + 1).pow(3).sum()
    return float((total - own) / (len(rows) * (len(rows) - 1)))


def _by_distances(rows: Features, others: Others, make: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """What ``make`` makes of the distances of some rows to all others: in float64 about the mean, because features are
    often far from the origin."""
    centre = others.double().mean(0)
    centred = others.double() - centre
    return _by_blocks(rows, lambda block, places: make(torch.cdist(block.double() - centre, centred), places))


def _by_blocks(rows: Tensor, make: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """What ``make`` makes of each block of rows and its place among them; each rank makes a part."""

    def part(places: slice) -> list[Tensor]:
        starts = range(places.start, places.stop, BLOCK)
        blocks = (slice(start, min(start + BLOCK, places.stop)) for start in starts)
        return [torch.cat([make(rows[block], block) for block in blocks])]

    return gather_parts(len(rows), BLOCK, part)[0]
