"""Pairs of points drawn from a plan: each source once, targets as evenly as the plan's masses allow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.errors import ProblemError
from pipelines.randomness import derived_seed
from pipelines.transport.plan import TransportPlan

BALANCE = 4.0
"""Weight of what a target is owed against the masses of a row, in logarithms: 95% of the targets of a uniform plan are
covered, and 0.15 of a row's mass is drawn elsewhere than independent draws would have it."""

ROWS = 256
"""Rows of an entropic plan that are held at a time."""


@dataclass(frozen=True, eq=False)
class PlanPairs:
    """Pairs along a plan.

    Attributes:
        sources: places of the sources, (n,) int64.
        targets: places of their targets, (n,) int64. Labels, images and whatever else belongs to a target are taken
            by the same places, and so cannot part from it.
    """

    sources: torch.Tensor
    targets: torch.Tensor


def draw_pairs(plan: TransportPlan, seed: int, draw: int = 0) -> PlanPairs:
    """One target for each source point: the permutation where the plan is one, balanced draws from its rows otherwise.

    Independent draws leave out 37% of the targets of a uniform plan and repeat others. Here each source draws from its
    row (by the Gumbel maximum, Maddison et al. 2014) with what each target is owed by the rows so far in favour of it:
    the mass that they would have sent there on average, less the pairs that it has had.

    Args:
        plan: of any solver; each source counts once, whatever it weighs.
        seed: of the draw.
        draw: its number; another number gives other pairs.

    Returns:
        Pairs in the order of the sources; a function of the plan, ``seed`` and ``draw`` alone.

    Raises:
        ProblemError: a source carries no mass, or the plan has lost its points.
    """
    n, m = plan.shape
    if plan.assignment is not None:
        return PlanPairs(torch.arange(n), torch.as_tensor(plan.assignment))
    rng = np.random.default_rng(derived_seed(seed, draw, "pairs"))
    owed = np.zeros(m)
    targets = np.empty(n, dtype=np.int64)
    for source, (columns, mass) in enumerate(_rows(plan)):
        total = mass.sum()
        if not total > 0:
            raise ProblemError(f"source {source} carries no mass: it has no target", cure="leave it out of the problem")
        share = mass / total
        owed[columns] += share
        chances = np.log(share) + BALANCE * owed[columns] + rng.gumbel(size=len(share))
        targets[source] = columns[chances.argmax()]
        owed[targets[source]] -= 1
    return PlanPairs(torch.arange(n), torch.as_tensor(targets))


def _rows(plan: TransportPlan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Columns and masses of each row, entries without mass left out."""
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
