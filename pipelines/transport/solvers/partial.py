"""Partial transport: a part of the mass is moved, the part that moves cheapest."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from pipelines.errors import ProblemError
from pipelines.transport.cost import cost_matrix
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import network_simplex


def solve(problem: TransportProblem, *, mass: float) -> TransportPlan:
    """The cheapest plan that moves a given mass, with at most a out of each source and b into each target.

    By a dummy point on each side that takes what stays (Chapel, Alaya & Gasso 2020, prop. 1), and the network simplex.
    The certificate's ``primal`` and ``dual`` bound the cost of what moves; ``marginal_error`` is that of the extended
    problem: the plan's own marginals fall short of a and b by what stays.

    Args:
        problem: epsilon 0.
        mass: to move, in (0, 1].

    Returns:
        A sparse plan of the given mass, without potentials.

    Raises:
        ProblemError: epsilon > 0, or a mass out of range.
        NotConvergedError: as of the network simplex.
    """
    started = time.perf_counter()
    if problem.epsilon > 0 or not 0 < mass <= 1:
        raise ProblemError(
            f"mass {mass:g} at epsilon {problem.epsilon:g} received", cure="give a mass in (0, 1] and epsilon 0"
        )
    n, m = problem.shape
    stays = 1 - mass
    costs = cost_matrix(problem).cpu().numpy()
    extended = np.zeros((n + 1, m + 1), dtype=np.float32)
    extended[:n, :m] = costs
    # Dearer than any route through the other dummy, so that no mass goes from dummy to dummy.
    extended[n, m] = 2 * costs.max() + 1
    a, b = (np.append(side, stays) for side in (problem.source_weights(), problem.target_weights()))
    whole = network_simplex.solve(TransportProblem.from_cost(extended, a=a, b=b))
    whole.certificate.require_converged()
    rows, columns, moved = whole.entries()
    inside = (rows < n) & (columns < m)
    # The extended problem divides by its mass.
    total = 1 + stays
    certificate = dataclasses.replace(
        whole.certificate,
        primal=whole.certificate.primal * total,
        dual=whole.certificate.dual * total,
        solver="partial",
        milliseconds=(time.perf_counter() - started) * 1e3,
    )
    return TransportPlan((n, m), certificate, rows=rows[inside], columns=columns[inside], mass=moved[inside] * total)
