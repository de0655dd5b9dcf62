"""Transport on the line, by sorting (Peyré & Cuturi 2019, remark 2.30)."""

from __future__ import annotations

import time

import numpy as np
import torch

from pipelines.errors import ProblemError
from pipelines.transport.cost import matched_cost
from pipelines.transport.exact_bounds import certified
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.rounding import of_masses


def solve(problem: TransportProblem) -> TransportPlan:
    """Compute the optimal plan between points on the line, sparse, with potentials that prove it.

    The plan is the same for all costs that are convex in the difference. The potentials follow the plan from left to
    right: its entries form a path, along which ``f_i + g_j = C_ij``.

    Raises:
        ProblemError: if the points have more than one coordinate, if epsilon > 0, if a cost matrix is given, or if the
            cost is not convex.
    """
    started = time.perf_counter()
    if problem.matrix is not None or problem.x is None or problem.y is None or problem.x.shape[1] != 1:
        raise ProblemError("points of one coordinate expected", hint="use solver 'auto'")
    if problem.epsilon > 0 or problem.cost == "cosine" or (problem.cost == "power" and problem.power < 1):
        raise ProblemError(
            f"sorting solves convex costs at epsilon 0, received {problem.cost} at {problem.epsilon:g}",
            hint="use solver 'auto'",
        )
    x, y = (torch.as_tensor(side).cpu().double()[:, 0] for side in (problem.x, problem.y))
    rows, columns, mass = sorted_plan(x.numpy(), y.numpy(), problem.a, problem.b)
    costs = matched_cost(x[rows, None], y[columns, None], problem.cost, problem.power).numpy()
    g = _potentials(x, y, rows, columns, costs, problem)
    plan = certified(
        problem,
        entries=(rows, columns, mass),
        g=g,
        solver="one-dimensional",
        iterations=0,
        started=started,
    )
    plan.certificate.require_converged()
    return plan


def sorted_plan(
    x: np.ndarray, y: np.ndarray, a: np.ndarray | None = None, b: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the monotone plan between numbers: rows, columns and mass of its entries, from left to right.

    Args:
        x: source numbers, (n,).
        y: target numbers, (m,).
        a: weights of x, (n,), with sum 1; uniform by default.
        b: weights of y, (m,), with sum 1; uniform by default.
    """
    import ot  # imported here because it imports scikit-learn, which takes half a second

    left, right = np.argsort(x, kind="stable"), np.argsort(y, kind="stable")
    a = np.full(len(x), 1 / len(x)) if a is None else a
    b = np.full(len(y), 1 / len(y)) if b is None else b
    plan = ot.emd_1d(x[left], y[right], a[left], b[right], dense=False)
    held = plan.tocoo()
    # Rounding residues of weights are not entries: they would connect unrelated clusters.
    kept = held.data > of_masses(a, b)
    rows, columns, mass = held.row[kept], held.col[kept], held.data[kept]
    order = np.lexsort((columns, rows))
    return left[rows[order]], right[columns[order]], np.asarray(mass[order])


def _potentials(
    x: torch.Tensor,
    y: torch.Tensor,
    rows: np.ndarray,
    columns: np.ndarray,
    costs: np.ndarray,
    problem: TransportProblem,
) -> np.ndarray:
    f, g = np.full(len(x), np.nan), np.full(len(y), np.nan)
    f[rows[0]] = 0.0
    for place, (row, column, cost) in enumerate(zip(rows, columns, costs, strict=True)):
        if place and row != rows[place - 1] and column != columns[place - 1]:
            # The path breaks where a source and a target end together; the pairs across the break bound f[row] on both
            # sides. Close to 0, the potentials of distant clusters stay as small as the costs within them.
            source, target = rows[place - 1], columns[place - 1]
            most = float(_cost(x[row], y[target], problem)) - g[target]
            least = f[source] + cost - float(_cost(x[source], y[column], problem))
            f[row] = min(max(0.0, least), most)
        if np.isnan(f[row]):
            f[row] = cost - g[column]
        else:
            g[column] = cost - f[row]
    return g


def _cost(x: torch.Tensor, y: torch.Tensor, problem: TransportProblem) -> torch.Tensor:
    return (x - y).abs().pow(problem.exponent)
