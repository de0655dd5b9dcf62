"""Partial transport: moves a given part of the mass at minimum cost."""

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
    """Compute the cheapest plan of a given mass, with at most a out of each source and at most b into each target.

    Adds a dummy point on each side for the mass that does not move (Chapel, Alaya & Gasso 2020, prop. 1), and runs the
    network simplex. The certificate's ``primal`` and ``dual`` bound the cost of the moved mass; ``marginal_error`` is
    the amount by which rows and columns exceed a and b, plus the deviation of the moved mass from the given one.

    Args:
        problem: problem with epsilon 0.
        mass: mass to move, in (0, 1].

    Returns:
        A sparse plan of the given mass, with potentials as expected by :func:`partial_bounds`.

    Raises:
        ProblemError: if epsilon > 0, or the mass is out of range.
        NotConvergedError: if the network simplex does not converge.
    """
    started = time.perf_counter()
    if problem.epsilon > 0 or not 0 < mass <= 1:
        raise ProblemError(
            f"mass {mass:g} at epsilon {problem.epsilon:g} received", hint="give a mass in (0, 1] and epsilon 0"
        )
    found = _solve(problem, mass, direct=False)
    if not found.bounds.closed and problem.matrix is None:
        # For distant clusters, costs from a matrix product have too few digits to distinguish small costs.
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
    # The moved mass is fixed, so a constant added to all costs does not change the plan.
    offset, spread = float(finite.min()), float(finite.max() - finite.min())
    extended = np.zeros((n + 1, m + 1))
    extended[:n, :m] = costs - offset
    # More expensive than any other route, so that no mass moves from dummy to dummy.
    extended[n, m] = 2 * spread or abs(offset) or 1.0
    a, b = (np.append(side, stays) for side in (problem.source_weights(), problem.target_weights()))
    whole = network_simplex.solve(TransportProblem.from_cost(extended, a=a, b=b))
    rows, columns, moved = whole.entries()
    inside = (rows < n) & (columns < m)
    # The extended problem is normalised to mass 1.
    entries = Entries(rows[inside], columns[inside], moved[inside] * (1 + stays), False)
    assert whole.f is not None
    assert whole.g is not None
    bounds = partial_bounds(problem, entries, whole.f[:n] + whole.g[m], whole.g[:m] + whole.f[n], mass)
    return _Found(entries, bounds, whole.certificate.iterations)
