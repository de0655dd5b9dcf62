"""Brute force over all permutations, for n ≤ 8: the reference for tests of the other solvers."""

from __future__ import annotations

import itertools
import time

import numpy as np

from pipelines.errors import ProblemError
from pipelines.transport.exact_bounds import certified
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers.duality import potentials_of_assignment
from pipelines.transport.true_cost import TrueCost

LARGEST = 8


def solve(problem: TransportProblem) -> TransportPlan:
    """Solve Monge's problem by trying all n! permutations, as the article does for n = 6 (720 permutations).

    Raises:
        ProblemError: if n is larger than 8, or the problem is not an assignment problem.
    """
    started = time.perf_counter()
    n, m = problem.shape
    if not problem.is_assignment or n > LARGEST:
        raise ProblemError(
            f"brute force takes uniform assignments of n ≤ {LARGEST}, received {n} × {m}",
            hint="use solver 'auto'",
        )
    direct = TrueCost(problem, direct=True)
    costs = direct.block(0, n).cpu().numpy()
    permutations = np.array(list(itertools.permutations(range(n))))
    totals = costs[np.arange(n), permutations].sum(1)
    if not np.isfinite(totals).any():
        raise ProblemError("matrix: infeasible: every permutation has a forbidden pair", hint="allow more pairs")
    assignment = permutations[totals.argmin()].astype(np.int64)
    g = potentials_of_assignment(costs, assignment)
    return certified(
        problem,
        assignment=assignment,
        g=g,
        cost=direct,
        solver="brute-force",
        iterations=len(permutations),
        started=started,
    )
