"""Dual potentials, which prove that a plan is optimal."""

from __future__ import annotations

import numpy as np

from pipelines.transport.rounding import U64


def potentials_of_assignment(costs: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Compute target potentials of a permutation, (n,); see :func:`potentials_of_plan`."""
    return potentials_of_plan(costs, np.arange(len(assignment)), assignment)


def potentials_of_plan(costs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Compute target potentials that prove a plan optimal, if it is optimal.

    Complementary slackness requires ``g_j − g_l ≤ C_ij − C_il`` for every entry (i, l) of the plan. These are
    shortest-path inequalities, which Bellman–Ford relaxes. If the plan is not optimal, they have no solution, and the
    returned potentials leave a duality gap.

    Potentials start at 0 and decrease only as far as necessary, so they are no larger than the relevant cost
    differences. Large potentials would lose the digits of small costs.

    Args:
        costs: (n, m) float64; infinite for forbidden pairs.
        rows, columns: entries of the plan, (k,) int each, without forbidden pairs.

    Returns:
        (m,) float64.
    """
    paid = costs[rows, columns]
    slack = costs[rows] - paid[:, None]
    # Rounding can make zero-length cycles slightly negative; relaxing them would not terminate.
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
