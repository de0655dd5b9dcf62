"""Partial transport: a part of the mass is moved, the part that moves cheapest."""

from __future__ import annotations

import time

import numpy as np

from pipelines.errors import ProblemError
from pipelines.transport.exact_bounds import Entries, certificate_of
from pipelines.transport.partial_bounds import partial_bounds
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import network_simplex
from pipelines.transport.true_cost import cost_matrix


def solve(problem: TransportProblem, *, mass: float) -> TransportPlan:
    """The cheapest plan that moves a given mass, with at most a out of each source and b into each target.

    By a dummy point on each side that takes what stays (Chapel, Alaya & Gasso 2020, prop. 1), and the network simplex.
    The certificate's ``primal`` and ``dual`` bound the cost of what moves; ``marginal_error`` is by how much rows and
    columns exceed a and b, and by how much the mass that moves is not the given one.

    Args:
        problem: epsilon 0.
        mass: to move, in (0, 1].

    Returns:
        A sparse plan of the given mass, with potentials as :func:`partial_bounds` takes them.

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
    finite = costs[np.isfinite(costs)]
    if not len(finite):
        raise ProblemError("matrix: every pair is forbidden: nothing may move", cure="allow more pairs")
    # A constant more for each unit of mass that moves, whose amount is given, leaves the plan as it is.
    offset, spread = float(finite.min()), float(finite.max() - finite.min())
    extended = np.zeros((n + 1, m + 1))
    extended[:n, :m] = costs - offset
    # Dearer than any route through the other dummy, so that no mass goes from dummy to dummy.
    extended[n, m] = 2 * spread or 1.0
    a, b = (np.append(side, stays) for side in (problem.source_weights(), problem.target_weights()))
    whole = network_simplex.solve(TransportProblem.from_cost(extended, a=a, b=b))
    whole.certificate.require_converged()
    rows, columns, moved = whole.entries()
    inside = (rows < n) & (columns < m)
    # The extended problem divides by its mass.
    total = 1 + stays
    found = rows[inside], columns[inside], moved[inside] * total
    assert whole.f is not None
    assert whole.g is not None
    bounds = partial_bounds(problem, Entries(*found, False), whole.f[:n] + whole.g[m], whole.g[:m] + whole.f[n], mass)
    certificate = certificate_of(bounds, solver="partial", iterations=whole.certificate.iterations, started=started)
    certificate.require_converged()
    return TransportPlan((n, m), certificate, rows=found[0], columns=found[1], mass=found[2], f=bounds.f, g=bounds.g)
