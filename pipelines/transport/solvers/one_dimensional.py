"""Transport on the line, by sorting (Peyré & Cuturi 2019, remark 2.30)."""

from __future__ import annotations

import time

import numpy as np
import ot
import torch

from pipelines.errors import ProblemError
from pipelines.transport.cost import matched_cost
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem


def solve(problem: TransportProblem) -> TransportPlan:
    """The optimal plan between points of one coordinate, sparse, with potentials that prove it.

    It is the same for all costs that are convex in the difference. The potentials follow the plan from left to right:
    its entries form a path, along which ``f_i + g_j = C_ij``.

    Raises:
        ProblemError: more than one coordinate, epsilon > 0, a cost matrix, or a cost that is not convex.
    """
    started = time.perf_counter()
    if problem.matrix is not None or problem.x is None or problem.y is None or problem.x.shape[1] != 1:
        raise ProblemError("points of one coordinate expected", cure="use solver 'auto'")
    if problem.epsilon > 0 or problem.cost == "cosine" or (problem.cost == "power" and problem.power < 1):
        raise ProblemError(
            f"sorting solves convex costs at epsilon 0, received {problem.cost} at {problem.epsilon:g}",
            cure="use solver 'auto'",
        )
    x, y = (torch.as_tensor(side).cpu().double()[:, 0] for side in (problem.x, problem.y))
    rows, columns, mass = sorted_plan(x.numpy(), y.numpy(), problem.a, problem.b)
    costs = matched_cost(x[rows, None], y[columns, None], problem.cost, problem.power).numpy()
    f, g = _potentials(x, y, rows, columns, costs, problem)
    a, b = problem.source_weights(), problem.target_weights()
    primal, dual = float(mass @ costs), float(a @ f + b @ g)
    sent, met = np.bincount(rows, mass, len(a)), np.bincount(columns, mass, len(b))
    scale = max(primal, float(costs.max()), np.finfo(float).tiny)
    certificate = Certificate(
        primal=primal,
        dual=dual,
        marginal_error=float(np.abs(sent - a).sum() + np.abs(met - b).sum()),
        iterations=0,
        converged=primal - dual <= 1e-9 * scale,
        solver="one-dimensional",
        milliseconds=(time.perf_counter() - started) * 1e3,
    )
    certificate.require_converged()
    return TransportPlan(problem.shape, certificate, rows=rows, columns=columns, mass=mass, f=f, g=g)


def sorted_plan(
    x: np.ndarray, y: np.ndarray, a: np.ndarray | None = None, b: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The monotone plan between numbers, entries from left to right: rows, columns, mass.

    Args:
        x: (n,).
        y: (m,).
        a: weights of x, (n,) summing to 1; uniform by default.
        b: weights of y, (m,).
    """
    left, right = np.argsort(x, kind="stable"), np.argsort(y, kind="stable")
    a = np.full(len(x), 1 / len(x)) if a is None else a
    b = np.full(len(y), 1 / len(y)) if b is None else b
    plan = ot.emd_1d(x[left], y[right], a[left], b[right], dense=False)
    held = plan.tocoo()
    order = np.lexsort((held.col, held.row))
    return left[held.row[order]], right[held.col[order]], np.asarray(held.data[order])


def _potentials(
    x: torch.Tensor,
    y: torch.Tensor,
    rows: np.ndarray,
    columns: np.ndarray,
    costs: np.ndarray,
    problem: TransportProblem,
) -> tuple[np.ndarray, np.ndarray]:
    f, g = np.full(len(x), np.nan), np.full(len(y), np.nan)
    f[rows[0]] = 0.0
    for place, (row, column, cost) in enumerate(zip(rows, columns, costs, strict=True)):
        if place and row != rows[place - 1] and column != columns[place - 1]:
            # The path breaks where both sides end together; any point between the two is on both sides' way.
            last = columns[place - 1]
            f[row] = float(_cost(x[row], y[last], problem)) - g[last]
        if np.isnan(f[row]):
            f[row] = cost - g[column]
        else:
            g[column] = cost - f[row]
    # Points without mass are not on the path: a c-transform gives them, and makes all feasible to the last digit.
    f, g = np.where(np.isnan(f), -np.inf, f), np.where(np.isnan(g), -np.inf, g)
    for start in range(0, len(x), 1024):
        block = _cost(x[start : start + 1024, None], y[None, :], problem).numpy()
        f[start : start + 1024] = (block - g).min(1)
    least = np.full(len(y), np.inf)
    for start in range(0, len(x), 1024):
        block = _cost(x[start : start + 1024, None], y[None, :], problem).numpy()
        least = np.minimum(least, (block - f[start : start + 1024, None]).min(0))
    return f, least


def _cost(x: torch.Tensor, y: torch.Tensor, problem: TransportProblem) -> torch.Tensor:
    power = {"squared-euclidean": 2.0, "euclidean": 1.0}.get(problem.cost, problem.power)
    return (x - y).abs().pow(power)
