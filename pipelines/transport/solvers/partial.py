"""Partial transport: a part of the mass is moved, the part that moves cheapest."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from pipelines.errors import ProblemError
from pipelines.transport.exact_bounds import Entries, ExactBounds, certificate_of
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
            f"mass {mass:g} at epsilon {problem.epsilon:g} received", hint="give a mass in (0, 1] and epsilon 0"
        )
    found = _solve(problem, mass, direct=False)
    if not found.bounds.closed and problem.matrix is None:
        # Between clusters far apart, costs from a matrix product have no digits left for those that decide.
        found = _solve(problem, mass, direct=True)
    certificate = certificate_of(found.bounds, solver="partial", iterations=found.pivots, started=started)
    certificate.require_converged()
    entries = found.entries
    return TransportPlan(
        problem.shape,
        certificate,
        rows=entries.rows,
        columns=entries.columns,
        mass=entries.mass,
        f=found.bounds.f,
        g=found.bounds.g,
    )


@dataclass(frozen=True, eq=False)
class _Found:
    entries: Entries
    bounds: ExactBounds
    pivots: int


def _solve(problem: TransportProblem, mass: float, *, direct: bool) -> _Found:
    n, m = problem.shape
    stays = 1 - mass
    costs = cost_matrix(problem, direct=direct).cpu().numpy()
    finite = costs[np.isfinite(costs)]
    if not len(finite):
        raise ProblemError("matrix: every pair is forbidden: nothing may move", hint="allow more pairs")
    # A constant more for each unit of mass that moves, whose amount is given, leaves the plan as it is.
    offset, spread = float(finite.min()), float(finite.max() - finite.min())
    extended = np.zeros((n + 1, m + 1))
    extended[:n, :m] = costs - offset
    # Dearer than any route through the other dummy, so that no mass goes from dummy to dummy.
    extended[n, m] = 2 * spread or abs(offset) or 1.0
    a, b = (np.append(side, stays) for side in (problem.source_weights(), problem.target_weights()))
    whole = network_simplex.solve(TransportProblem.from_cost(extended, a=a, b=b))
    rows, columns, moved = whole.entries()
    inside = (rows < n) & (columns < m)
    # The extended problem divides by its mass.
    entries = Entries(rows[inside], columns[inside], moved[inside] * (1 + stays), False)
    assert whole.f is not None
    assert whole.g is not None
    bounds = partial_bounds(problem, entries, whole.f[:n] + whole.g[m], whole.g[:m] + whole.f[n], mass)
    return _Found(entries, bounds, whole.certificate.iterations)
