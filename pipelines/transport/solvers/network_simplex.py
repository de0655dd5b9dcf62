"""Kantorovich's linear programme: weighted and rectangular problems, by POT's network simplex."""

from __future__ import annotations

import time
import warnings

import numpy as np
import ot

from pipelines.errors import ProblemError
from pipelines.transport.cost import cost_matrix
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers.duality import GAP_TOLERANCE

MAX_PIVOTS = 100_000_000
"""POT's own limit of 100,000 pivots stops short of the optimum from n ≈ 2048 on, with no more than a warning."""


def solve(problem: TransportProblem) -> TransportPlan:
    """An optimal plan with at most n + m − 1 non-zero entries (Dantzig's simplex on the transport polytope).

    Peyré & Cuturi (2019), section 3.5. Points of zero weight are left out of the solve and get feasible potentials.

    Raises:
        ProblemError: epsilon > 0.
    """
    started = time.perf_counter()
    if problem.epsilon > 0:
        raise ProblemError(f"epsilon: {problem.epsilon:g} received by an exact solver", cure="use solver 'auto'")
    costs = cost_matrix(problem).cpu().numpy().astype(np.float64)
    a, b = problem.source_weights(), problem.target_weights()
    sources, targets = np.flatnonzero(a), np.flatnonzero(b)
    inner = np.ascontiguousarray(costs[np.ix_(sources, targets)])
    with warnings.catch_warnings():
        # Its warnings are about convergence, which the certificate below decides.
        warnings.simplefilter("ignore")
        # It moves nothing where all costs are negative; a constant added to all of them leaves the plan as it is.
        plan, log = ot.emd(
            a[sources],
            b[targets],
            inner - inner.min(),
            numItermax=MAX_PIVOTS,
            log=True,
            center_dual=False,
            numThreads=1,
        )
    rows, columns = np.nonzero(plan)
    mass = plan[rows, columns]

    g = np.full(len(b), -np.inf)
    g[targets] = log["v"]
    # A c-transform makes the potentials feasible to the last digit, zero weights included.
    f = (costs[:, targets] - g[targets]).min(1)
    g = (costs - f[:, None]).min(0)
    primal = float((mass * inner[rows, columns]).sum())
    dual = float(a @ f + b @ g)
    marginal_error = float(np.abs(plan.sum(1) - a[sources]).sum() + np.abs(plan.sum(0) - b[targets]).sum())
    certificate = Certificate(
        primal=primal,
        dual=dual,
        marginal_error=marginal_error,
        iterations=int(log.get("numIter", 0)),
        converged=primal - dual <= GAP_TOLERANCE * max(float(costs.max()), abs(primal)) and marginal_error <= 1e-6,
        solver="network-simplex",
        milliseconds=(time.perf_counter() - started) * 1e3,
    )
    return TransportPlan(problem.shape, certificate, rows=sources[rows], columns=targets[columns], mass=mass, f=f, g=g)
