"""Monge's problem between uniform sets of equal size: a Jonker–Volgenant assignment."""

from __future__ import annotations

import time

import lap
import numpy as np

from pipelines.errors import ProblemError
from pipelines.transport.cost import cost_matrix
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers.duality import GAP_TOLERANCE, potentials_of_assignment


def solve(problem: TransportProblem) -> TransportPlan:
    """An optimal permutation by shortest augmenting paths (Jonker & Volgenant 1987), by ``lapx``.

    Raises:
        ProblemError: weights, or different numbers of points on both sides.
    """
    started = time.perf_counter()
    n, m = problem.shape
    if not problem.is_assignment:
        raise ProblemError(
            f"an assignment has uniform weights, as many points on both sides and epsilon 0; received {n} × {m}",
            cure="use solver 'auto'",
        )
    costs = cost_matrix(problem).cpu().numpy()
    _, columns = lap.lapjvh(costs, return_cost=False)
    assignment = np.asarray(columns, dtype=np.int64)
    f, g = potentials_of_assignment(costs, assignment)
    primal = float(costs[np.arange(n), assignment].mean(dtype=np.float64))
    dual = float(f.mean() + g.mean())
    certificate = Certificate(
        primal=primal,
        dual=dual,
        marginal_error=0.0,
        iterations=n,
        converged=primal - dual <= GAP_TOLERANCE * max(float(costs.max()), abs(primal)),
        solver="assignment",
        milliseconds=(time.perf_counter() - started) * 1e3,
    )
    return TransportPlan((n, n), certificate, assignment=assignment, f=f, g=g)
