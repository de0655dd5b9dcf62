"""Monge's problem between uniform sets of equal size, by Jonker–Volgenant assignment on the float64 cost matrix."""

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
    """Compute an optimal permutation by shortest augmenting paths (Jonker & Volgenant 1987) with ``lapx``.

    If the result is not proven optimal, e.g. because the costs span more digits than float64 has, SciPy solves the
    problem again with costs computed from differences. The plan with the smaller gap is returned.

    Raises:
        ProblemError: if the problem has weights or sides of different size, or if no permutation avoids the forbidden
            pairs.
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
        # Offset and unit do not change the plan; normalised costs do not overflow.
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
    """Shift and scale costs to [0, 1], except for forbidden pairs."""
    finite = costs[np.isfinite(costs)]
    least, most = float(finite.min()), float(finite.max())
    return (costs - least) / (most - least) if most > least else np.where(np.isfinite(costs), 0.0, costs)


def _check_feasible(costs: np.ndarray) -> None:
    """Check that a permutation without forbidden pairs exists (König's theorem).

    Raises:
        ProblemError: if there is no such permutation; the message states how many points can be matched.
    """
    matched = maximum_bipartite_matching(csr_array(np.isfinite(costs)), perm_type="column")
    found = int((matched >= 0).sum())
    if found < len(costs):
        raise ProblemError(
            f"matrix: infeasible: forbidden pairs let at most {found} of {len(costs)} points be matched",
            hint="allow more pairs: +inf forbids one",
        )
