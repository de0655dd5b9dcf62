"""Gromov–Wasserstein transport between sets in different spaces, from the distances within each set."""

from __future__ import annotations

import time

import numpy as np
import torch

from pipelines.transport.cost import pairwise_cost
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem

MAX_STEPS = 1000

TOLERANCE = 1e-7
"""Relative decrease of the objective below which the conditional gradient method stops."""


def solve(x: np.ndarray, y: np.ndarray, *, a: np.ndarray | None = None, b: np.ndarray | None = None) -> TransportPlan:
    """Compute a stationary plan of ``Σ |d(x_i, x_k) − d(y_j, y_l)|² P_ij P_kl``.

    Mémoli (2011); Peyré & Cuturi (2019), eq. 10.8. The distance d is Euclidean. The problem is not convex, and the only
    known lower bound is 0: ``dual`` is 0, and ``gap`` is the distortion. ``converged`` means that the last linear
    subproblem found no descent direction.

    Args:
        x: points, (n, d).
        y: points, (m, e); the dimension may differ from that of x.
        a: weights of x; uniform by default.
        b: weights of y; uniform by default.

    Raises:
        ProblemError: see :meth:`TransportProblem.between`.
        NotConvergedError: if no stationary plan is found within the maximum number of steps.
    """
    import ot  # imported here because it imports scikit-learn, which takes half a second

    started = time.perf_counter()
    sides = [TransportProblem.between(side, side, a=w, b=w) for side, w in ((x, a), (y, b))]
    distances = [
        pairwise_cost(*(torch.as_tensor(side.x).cpu().double(),) * 2, "euclidean").fill_diagonal_(0).numpy()
        for side in sides
    ]
    left, right = (side.source_weights() for side in sides)
    scale = max(float(matrix.max()) for matrix in distances) or 1.0
    matrices = [matrix / scale for matrix in distances]
    plan, log = ot.gromov.gromov_wasserstein(
        *matrices, left, right, "square_loss", log=True, max_iter=MAX_STEPS, tol_rel=TOLERANCE, tol_abs=TOLERANCE
    )
    rows, columns = np.nonzero(plan)
    # Linear subproblem at the plan: the plan is stationary if the simplex finds no cheaper one.
    gradient = ot.gromov.gwggrad(*ot.gromov.init_matrix(*matrices, left, right), plan)
    descent = float((gradient * (plan - ot.emd(left, right, gradient))).sum())
    primal = float(log["gw_dist"]) * scale**2
    error = float(np.abs(plan.sum(1) - left).sum() + np.abs(plan.sum(0) - right).sum())
    certificate = Certificate(
        primal=max(primal, 0.0),
        dual=0.0,
        marginal_error=error,
        iterations=len(log["loss"]),
        converged=descent <= 1e-5 and error <= 1e-6,
        solver="gromov",
        milliseconds=(time.perf_counter() - started) * 1e3,
    )
    certificate.require_converged()
    return TransportPlan(plan.shape, certificate, rows=rows, columns=columns, mass=plan[rows, columns])
