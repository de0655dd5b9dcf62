"""Monge's problem between uniform sets of equal size: a Jonker–Volgenant assignment over the float64 cost matrix."""

from __future__ import annotations

import time

import lap
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from pipelines.errors import ProblemError
from pipelines.transport.exact_bounds import SHARP, certified
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers.duality import potentials_of_assignment
from pipelines.transport.true_cost import TrueCost, cost_matrix


def solve(problem: TransportProblem) -> TransportPlan:
    """An optimal permutation by shortest augmenting paths (Jonker & Volgenant 1987), by ``lapx``.

    Where its answer is not proven optimal, as where costs spread over more digits than float64 has, SciPy solves costs
    that are computed from differences, and then the more proven of the two plans is returned.

    Raises:
        ProblemError: weights, or different numbers of points on both sides; or no permutation avoids forbidden pairs.
    """
    started = time.perf_counter()
    n, m = problem.shape
    if not problem.is_assignment:
        raise ProblemError(
            f"an assignment has uniform weights, as many points on both sides and epsilon 0; received {n} × {m}",
            hint="use solver 'auto'",
        )
    costs = cost_matrix(problem).cpu().numpy()
    forbidden = not np.isfinite(costs).all()
    first = None
    if not forbidden:
        # Of any offset and unit: the same plan, in numbers of which none overflows.
        _, columns = lap.lapjvh(_normal(costs), return_cost=False)
        first = _plan(problem, np.asarray(columns, dtype=np.int64), costs, None, started)
        if first.certificate.converged and first.certificate.relative_gap <= SHARP:
            return first
    else:
        _check_feasible(costs)
    direct = TrueCost(problem, direct=True)
    if problem.matrix is None:
        costs = cost_matrix(problem, direct=True).cpu().numpy()
    _, columns = linear_sum_assignment(_normal(costs))
    second = _plan(problem, columns.astype(np.int64), costs, direct, started)
    if first is not None and first.certificate.gap < second.certificate.gap:
        return first
    return second


def _plan(
    problem: TransportProblem, assignment: np.ndarray, costs: np.ndarray, cost: TrueCost | None, started: float
) -> TransportPlan:
    g = potentials_of_assignment(costs, assignment)
    return certified(
        problem,
        assignment=assignment,
        g=g,
        cost=cost,
        solver="assignment",
        iterations=len(assignment),
        started=started,
    )


def _normal(costs: np.ndarray) -> np.ndarray:
    """Costs less their least, over the largest: in [0, 1] but for forbidden pairs."""
    finite = costs[np.isfinite(costs)]
    least, most = float(finite.min()), float(finite.max())
    return (costs - least) / (most - least) if most > least else np.where(np.isfinite(costs), 0.0, costs)


def _check_feasible(costs: np.ndarray) -> None:
    """Refuse forbidden pairs that leave no permutation (König's theorem).

    Raises:
        ProblemError: with the most points that can be matched.
    """
    matched = maximum_bipartite_matching(csr_array(np.isfinite(costs)), perm_type="column")
    found = int((matched >= 0).sum())
    if found < len(costs):
        raise ProblemError(
            f"matrix: infeasible: forbidden pairs let at most {found} of {len(costs)} points be matched",
            hint="allow more pairs: +inf forbids one",
        )
