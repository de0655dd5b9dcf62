"""Every permutation, for n ≤ 8: the oracle against which the other solvers are held."""

from __future__ import annotations

import itertools
import time

import numpy as np

from pipelines.errors import ProblemError
from pipelines.transport.cost import cost_matrix
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers.duality import potentials_of_assignment

LARGEST = 8


def solve(problem: TransportProblem) -> TransportPlan:
    """Monge's problem by trying all n! permutations, as the article does for n = 6 (720 of them).

    Raises:
        ProblemError: n over 8, or not an assignment problem.
    """
    started = time.perf_counter()
    n, m = problem.shape
    if not problem.is_assignment or n > LARGEST:
        raise ProblemError(
            f"brute force takes uniform assignments of n ≤ {LARGEST}, received {n} × {m}",
            cure="use solver 'auto'",
        )
    costs = cost_matrix(problem).cpu().numpy().astype(np.float64)
    permutations = np.array(list(itertools.permutations(range(n))))
    totals = costs[np.arange(n), permutations].sum(1)
    assignment = permutations[totals.argmin()].astype(np.int64)
    f, g = potentials_of_assignment(costs, assignment)
    certificate = Certificate(
        primal=float(totals.min()) / n,
        dual=float(f.mean() + g.mean()),
        marginal_error=0.0,
        iterations=len(permutations),
        converged=True,
        solver="brute-force",
        milliseconds=(time.perf_counter() - started) * 1e3,
    )
    return TransportPlan((n, n), certificate, assignment=assignment, f=f, g=g)
