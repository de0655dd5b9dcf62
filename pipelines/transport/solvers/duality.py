"""Dual potentials: the proof that an assignment is optimal."""

from __future__ import annotations

import numpy as np

from pipelines.transport.rounding import U64


def potentials_of_assignment(costs: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Target potentials of a permutation, (n,); see :func:`potentials_of_plan`."""
    return potentials_of_plan(costs, np.arange(len(assignment)), assignment)


def potentials_of_plan(costs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Target potentials that prove a plan optimal, if it is.

    Complementary slackness asks for ``g_j − g_l ≤ C_ij − C_il`` for every entry (i, l) of the plan: shortest-path
    inequalities, which Bellman–Ford relaxes. If the plan is not optimal they have no solution, and what is returned
    leaves a gap that says by how much.

    Potentials start at 0 and fall only where they have to, so that they are no larger than the differences that decide:
    large ones would lose the digits of small costs.

    Args:
        costs: (n, m) float64; infinite for forbidden pairs.
        rows, columns: entries of the plan, (k,) int each, none of them forbidden.

    Returns:
        (m,) float64.
    """
    paid = costs[rows, columns]
    slack = costs[rows] - paid[:, None]
    # Rounding makes cycles of nothing slightly negative: relaxing them would not end.
    resolution = 8 * U64 * np.abs(paid)
    g = np.zeros(costs.shape[1])
    for _ in range(len(g)):
        offers = slack + g[columns][:, None]
        best = offers.argmin(0)
        relaxed = offers[best, np.arange(len(g))]
        lower = relaxed < g - resolution[best] - 8 * U64 * np.abs(g)
        if not lower.any():
            break
        g = np.where(lower, relaxed, g)
    return g
