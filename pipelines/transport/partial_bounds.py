"""Bounds on the cost of a partial plan, which moves a given mass: the linear programme's duality in float64."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.transport import rounding
from pipelines.transport.exact_bounds import Entries, ExactBounds, least_positive, resolution_of
from pipelines.transport.problem import TransportProblem
from pipelines.transport.true_cost import TrueCost


def partial_bounds(
    problem: TransportProblem, entries: Entries, f: np.ndarray, g: np.ndarray, mass: float
) -> ExactBounds:
    """Bounds from the entries of a partial plan and any potentials.

    For all ``f, g ≤ 0`` and every λ with ``λ + f_i + g_j ≤ C_ij``, ``λ mass + Σ a f + Σ b g`` is at most the optimum:
    each unit that moves pays at least ``λ + f_i + g_j``, and what a row or column sends is at most its weight.

    Args:
        problem: transport problem with epsilon 0.
        entries: entries of the plan.
        f, g: potentials, (n,) and (m,); positive values are clipped to 0.
        mass: mass to move.

    Returns:
        Bounds whose marginal error is the excess of rows and columns over their weights, plus the deviation of the
        moved mass from ``mass``.
    """
    bounds = _bounds(TrueCost(problem), problem, entries, f, g, mass)
    if bounds.closed or problem.matrix is not None:
        return bounds
    # Costs from differences are slower, and more precise where distances are far smaller than the spread.
    return _bounds(TrueCost(problem, direct=True), problem, entries, f, g, mass)


def _bounds(
    cost: TrueCost, problem: TransportProblem, entries: Entries, f: np.ndarray, g: np.ndarray, mass: float
) -> ExactBounds:
    n, m = problem.shape
    a, b = problem.source_weights(), problem.target_weights()
    rows, columns, moved = entries.rows, entries.columns, entries.mass
    low, high = cost.pairs(rows, columns)
    f, g = np.minimum(f, 0.0), np.minimum(g, 0.0)
    offered = torch.as_tensor(g, device=cost.device)
    least = np.inf
    for start in range(0, n, cost.height):
        stop = min(start + cost.height, n)
        block = cost.lower(start, stop) - torch.as_tensor(f[start:stop, None], device=cost.device) - offered
        least = min(least, float(block.amin()))
    least -= 8 * rounding.U64 * (abs(least) + float(np.abs(f).max() + np.abs(g).max()))
    (value, first), (of_rows, second), (of_columns, third) = (
        rounding.weighted_sum(*pair) for pair in ((moved, high), (a, f), (b, g))
    )
    dual = rounding.at_least(least * mass + of_rows + of_columns, (second, third, 4 * rounding.U64 * abs(least)))
    sent, met = np.bincount(rows, moved, n), np.bincount(columns, moved, m)
    error = float(np.maximum(sent - a, 0).sum() + np.maximum(met - b, 0).sum()) + abs(float(moved.sum()) - mass)
    # Excess or missing mass due to rounding moves at most at the largest cost in the plan.
    primal = rounding.at_most(value, (first, 2 * error * float(np.abs(high).max(initial=0.0))))
    size = float(moved @ np.abs(high)) or mass * least_positive(cost)
    return ExactBounds(max(primal, dual), dual, error, size, f, g, resolution_of(problem, moved, high - low))
