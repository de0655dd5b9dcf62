"""Distances and scores between features, (n, d), of real and of generated images.

All functions are collective: every rank calls them with the same features, and computes a part of the rows.
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
"""Number of rows of a matrix between two sets held at once. These are a few MiB, which the allocator reuses; it would
return larger blocks to the system each time."""

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
"""Index k of the nearest neighbour that defines the radius of a neighbourhood, as in the papers."""


def frechet_distance(real: Features, generated: Others) -> float:
    """``‖μ − ν‖² + tr(Σ + Τ − 2 (Σ Τ)^½)``: the squared 2-Wasserstein distance between Gaussians fitted to both sets.

    See Heusel et al. 2017, eq. 6 (FID, with features of Inception). The trace of the root is the sum of the roots of
    the eigenvalues of ``Σ^½ Τ Σ^½``, which is symmetric, so singular covariances are not a problem.

    Raises:
        ValueError: fewer than 2 rows on a side.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError("a covariance requires at least 2 rows")
    (mean, covariance), (other_mean, other_covariance) = (_moments(rows) for rows in (real, generated))
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    gap = (mean - other_mean).square().sum()
    return float(gap + covariance.trace() + other_covariance.trace() - 2 * cross)


def kernel_distance(real: Features, generated: Others) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy for the kernel ``(⟨x, y⟩ / d + 1)³``.

    See Bińkowski et al. 2018, section 4 (KID, with features of Inception); here over all rows instead of random
    subsets. It may be negative.

    Raises:
        ValueError: fewer than 2 rows on a side.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError("an unbiased estimate requires at least 2 rows")
    real, generated = real.double(), generated.double()
    return _mean_kernel(real, real) + _mean_kernel(generated, generated) - 2 * _mean_kernel(real, generated)


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """Features with the distances to their nearest neighbours in the same set.

    Attributes:
        rows: features, (n, d).
        radii: distances of each row to its k-th nearest other row, (n,) float64, by k.
    """

    rows: Features
    radii: dict[int, Float64[Tensor, " n"]]

    @classmethod
    def of(cls, rows: Features, *neighbours: int) -> Neighbourhoods:
        """Compute the radii for these values of k.

        Raises:
            ValueError: there are too few rows.
        """
        if len(rows) <= max(neighbours):
            raise ValueError(f"{len(rows)} rows have no {max(neighbours)} neighbours each")

        # The nearest row is the row itself.
        count = max(neighbours) + 1
        found = _by_distances(rows, rows, lambda found, _: found.topk(count, largest=False).values)
        return cls(rows, {k: found[:, k] for k in neighbours})


def neighbourhood_scores(real: Neighbourhoods, generated: Others) -> dict[str, float]:
    """``precision``, ``recall``, ``density`` and ``coverage``.

    Precision is the fraction of generated features that are in a real neighbourhood; recall is the fraction of real
    features in a generated neighbourhood. A neighbourhood is the ball around a feature whose radius is the distance to
    its k-th nearest neighbour in the same set (Kynkäänniemi et al. 2019, eq. 1 and 2, k = 3). Density is the mean
    number of real neighbourhoods that contain a generated feature, divided by k; coverage is the fraction of real
    neighbourhoods that contain one (Naeem et al. 2020, eq. 4 and 5, k = 5). Both are robust to single outliers.

    Args:
        real: real features, with the radii for both values of k.
        generated: generated features, (m, d).

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
    """Indices of the nearest points to each query, (n, count) int64, in increasing distance."""
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
    """Apply ``make`` to the distances of blocks of rows to all others, in float64 and centred, because features are
    often far from the origin."""
    centre = others.double().mean(0)
    centred = others.double() - centre
    return _by_blocks(rows, lambda block, places: make(torch.cdist(block.double() - centre, centred), places))


def _by_blocks(rows: Tensor, make: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Apply ``make`` to each block of rows and its slice; each rank computes a part."""

    def part(places: slice) -> list[Tensor]:
        starts = range(places.start, places.stop, BLOCK)
        blocks = (slice(start, min(start + BLOCK, places.stop)) for start in starts)
        return [torch.cat([make(rows[block], block) for block in blocks])]

    return gather_parts(len(rows), BLOCK, part)[0]
