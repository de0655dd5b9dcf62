"""Dual potentials: the proof that an assignment is optimal."""

from __future__ import annotations

import numpy as np

from pipelines.transport.rounding import U64


def potentials_of_assignment(costs: np.ndarray, assignment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Feasible potentials (f, g), ``f_i + g_j ≤ C_ij`` everywhere, tight on an optimal assignment.

    Complementary slackness asks for ``g_j − g_σ(i) ≤ C_ij − C_iσ(i)``, shortest-path inequalities, which Bellman–Ford
    relaxes. If the assignment is not optimal they have no solution; the potentials returned are feasible all the same,
    by a last c-transform, and leave a gap that says by how much.

    Potentials start at 0 and fall only where they have to, so that they are no larger than the differences that decide:
    large ones would lose the digits of small costs.

    Args:
        costs: (n, n) float64; infinite for forbidden pairs.
        assignment: (n,) int, the column of each row.

    Returns:
        f and g, (n,) float64 each.
    """
    n = len(assignment)
    matched = costs[np.arange(n), assignment]
    slack = costs - matched[:, None]
    # Rounding makes cycles of nothing slightly negative: relaxing them would not end.
    resolution = 8 * U64 * np.abs(matched)
    g = np.zeros(n)
    for _ in range(n):
        offers = slack + g[assignment][:, None]
        best = offers.argmin(0)
        relaxed = offers[best, np.arange(n)]
        lower = relaxed < g - resolution[best] - 8 * U64 * np.abs(g)
        if not lower.any():
            break
        g = np.where(lower, relaxed, g)
    return (costs - g).min(1), g
