"""Pairs of points drawn from a plan: each source once, with a target drawn from its row of the plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.errors import ProblemError
from pipelines.randomness import derived_seed
from pipelines.transport.plan import TransportPlan

ROWS = 256
"""Number of rows of an entropic plan held in memory at once."""


@dataclass(frozen=True, eq=False)
class PlanPairs:
    """Pairs along a plan.

    Attributes:
        sources: indices of the sources, (n,) int64.
        targets: indices of their targets, (n,) int64. They also index labels, images and other data of the targets.
    """

    sources: torch.Tensor
    targets: torch.Tensor


def draw_pairs(plan: TransportPlan, seed: int, draw: int = 0) -> PlanPairs:
    """Select one target for each source point: that of a permutation, otherwise a draw from its row of the plan.

    Source i goes to target j with probability ``P_ij / Σ_k P_ik`` exactly. Sources are not drawn independently of
    each other: [0, 1) is cut into n equal strata, a random permutation gives each source one, and a uniform number from
    it is mapped through the inverse distribution function of the source's row (Latin hypercube sampling, McKay, Beckman
    & Conover 1979). From a uniform plan, independent draws would leave out 37% of the targets; these meet each once.

    Args:
        plan: plan of any solver; each source is used once, for any weights.
        seed: seed of the draw.
        draw: index of the draw; different indices give different pairs.

    Returns:
        Pairs in the order of the sources, which depend only on the plan, ``seed`` and ``draw``.

    Raises:
        ProblemError: a source has no mass, or the plan lacks its points.
    """
    n = plan.shape[0]
    if plan.assignment is not None:
        return PlanPairs(torch.arange(n), torch.as_tensor(plan.assignment))
    rng = np.random.default_rng(derived_seed(seed, draw, "pairs"))
    places = (rng.permutation(n) + rng.random(n)) / n
    targets = np.empty(n, dtype=np.int64)
    for source, (columns, mass) in enumerate(_rows(plan)):
        reached = mass.cumsum()
        if not len(mass) or not reached[-1] > 0:
            raise ProblemError(f"source {source} carries no mass: it has no target", hint="leave it out of the problem")
        found = np.searchsorted(reached, places[source] * reached[-1], side="right")
        targets[source] = columns[min(found, len(columns) - 1)]
    return PlanPairs(torch.arange(n), torch.as_tensor(targets))


def _rows(plan: TransportPlan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns and masses of each row, without entries of mass 0."""
    n = plan.shape[0]
    held = plan.gibbs() if plan.by_potentials else None
    for start in range(0, n, ROWS if held else n):
        stop = min(start + ROWS, n) if held else n
        rows, columns, mass = held.entries(start, stop) if held else plan.entries()
        order = np.argsort(rows[mass > 0], kind="stable")
        rows, columns, mass = (part[mass > 0][order] for part in (rows, columns, mass))
        bounds = np.searchsorted(rows, np.arange(stop - start + 1))
        for first, last in itertools.pairwise(bounds):
            yield columns[first:last], mass[first:last]
