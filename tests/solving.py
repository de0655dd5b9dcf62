"""Runs a problem on all solvers that support it, so that all tests of laws include new solvers."""

from __future__ import annotations

from typing import get_args

import numpy as np
from scipy.spatial.distance import cdist

from pipelines.errors import ProblemError
from pipelines.spec import CostName
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName, solve
from pipelines.transport.verify import verify

COSTS: tuple[CostName, ...] = ("squared-euclidean", "euclidean", "cosine")


def all_plans(problem: TransportProblem) -> dict[str, TransportPlan]:
    """Return the verified plan of every solver that supports the problem, by name; ``auto`` supports all problems."""
    plans = {}
    for name in get_args(SolverName):
        try:
            plans[name] = solve(problem, name)
        except ProblemError:
            continue
        verify(problem, plans[name])
    assert "auto" in plans
    return plans


def costs_between(x: np.ndarray, y: np.ndarray, cost: CostName) -> np.ndarray:
    """Compute the cost matrix in float64 from the definition."""
    metric = {"squared-euclidean": "sqeuclidean"}.get(cost, cost)
    return cdist(np.asarray(x, np.float64), np.asarray(y, np.float64), metric)


def check_certificate(plan: TransportPlan, a: np.ndarray, b: np.ndarray, costs: np.ndarray, rounding: float) -> None:
    """Check the certificate of an exact plan against recomputed numbers.

    Args:
        plan: plan of a problem with epsilon 0.
        a, b: marginals.
        costs: cost matrix, (n, m) float64.
        rounding: rounding error of one cost, in the units of the cost.
    """
    certificate = plan.certificate
    assert certificate.converged
    assert plan.shape == costs.shape
    rows, columns, mass = plan.entries()
    assert (mass > 0).all()
    assert len(mass) <= sum(plan.shape) - 1
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(mass)
    dense = plan.dense()
    error = float(np.abs(dense.sum(1) - a).sum() + np.abs(dense.sum(0) - b).sum())
    assert error <= 1e-9
    assert abs(certificate.marginal_error - error) <= 1e-9
    assert abs(certificate.primal - (dense * costs).sum()) <= rounding

    assert plan.f is not None
    assert plan.g is not None
    f, g = plan.f.astype(np.float64), plan.g.astype(np.float64)
    assert (f[:, None] + g[None, :] - costs).max() <= rounding
    assert abs(certificate.dual - (a @ f + b @ g)) <= rounding
    # Weak duality, up to the rounding of two float64 sums.
    assert certificate.gap >= -1e-9 * max(1.0, float(costs.max()))
