"""Dual potentials: the proof that an assignment is optimal."""

from __future__ import annotations

import numpy as np

GAP_TOLERANCE = 1e-5
"""Relative duality gap at which an exact solver counts as converged: float32 costs have no more digits to give."""


def potentials_of_assignment(costs: np.ndarray, assignment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Feasible potentials (f, g), ``f_i + g_j ≤ C_ij`` everywhere, tight on an optimal assignment.

    Complementary slackness asks for ``g_j − g_σ(i) ≤ C_ij − C_iσ(i)``, shortest-path inequalities, which Bellman–Ford
    relaxes. If the assignment is not optimal they have no solution; the potentials returned are feasible all the same,
    by a last c-transform, and leave a gap that says by how much.

    Args:
        costs: (n, n) float.
        assignment: (n,) int, the column of each row.

    Returns:
        f and g, (n,) float64 each.
    """
    n = len(assignment)
    matched = costs[np.arange(n), assignment]
    slack = np.empty((n, n), dtype=costs.dtype)
    np.subtract(costs, matched[:, None], out=slack)
    g = np.zeros(n, dtype=costs.dtype)
    for _ in range(n):
        relaxed = np.minimum(g, (slack + g[assignment][:, None]).min(0))
        if np.array_equal(relaxed, g):
            break
        g = relaxed
    g = g.astype(np.float64)
    f = (costs - g).min(1)
    return f, g
