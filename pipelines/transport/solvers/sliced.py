"""The sliced distance: one-dimensional transport, averaged over directions."""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from pipelines.errors import ProblemError
from pipelines.randomness import step_generator
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.rounding import at_most, gamma, weighted_sum
from pipelines.transport.solvers.one_dimensional import sorted_plan
from pipelines.transport.true_cost import TrueCost

DIRECTIONS = 128


def distance(problem: TransportProblem, *, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """Compute the mean squared Wasserstein distance of projections on random directions (Bonneel et al. 2015, eq. 4).

    In the limit of many directions, it is at most the squared Euclidean transport cost divided by the dimension.

    Raises:
        ProblemError: if the cost is not squared Euclidean, or no points are given.
    """
    x, y, _, _ = _projected(problem, directions, seed)
    total = 0.0
    for left, right in zip(x, y, strict=True):
        rows, columns, mass = sorted_plan(left, right, problem.a, problem.b)
        total += float(mass @ (left[rows] - right[columns]) ** 2)
    return total / directions


def solve(problem: TransportProblem, *, directions: int = DIRECTIONS, seed: int = 0) -> TransportPlan:
    """Return the best of the plans from sorted projections (Mahey et al. 2023, "min-SWGG", eq. 8).

    Each direction takes O(n log n). The certificate has valid bounds: ``primal`` is the cost of the plan between the
    points, an upper bound of the optimum; ``dual`` is the largest transport cost between projections, a lower bound,
    because projections reduce distances. The gap between the two may be large. ``converged`` means that the plan meets
    its marginals, which holds by construction, not that it is optimal.

    Raises:
        ProblemError: if the cost is not squared Euclidean, epsilon > 0, or no points are given.
    """
    started = time.perf_counter()
    x, y, d, largest = _projected(problem, directions, seed)
    cost = TrueCost(problem)
    best: tuple[float, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
    dual = 0.0
    for left, right in zip(x, y, strict=True):
        rows, columns, mass = sorted_plan(left, right, problem.a, problem.b)
        dual = max(dual, float(mass @ (left[rows] - right[columns]) ** 2))
        value, rounding = weighted_sum(mass, cost.pairs(rows, columns)[1])
        primal = at_most(value, (rounding,))
        if best is None or primal < best[0]:
            best = primal, (rows, columns, mass)
    assert best is not None
    # Each computed coordinate differs from the true projection by at most γ |x − c|, so the error of the distance of
    # two sets is at most twice that (Minkowski's inequality); directions have length 1 up to rounding.
    error = gamma(d + 8)
    dual = max(0.0, math.sqrt(dual) * (1 - error) - 4 * error * largest) ** 2 * (1 - 2 * error)
    rows, columns, mass = best[1]
    a, b = problem.source_weights(), problem.target_weights()
    off = np.abs(np.bincount(rows, mass, len(a)) - a).sum() + np.abs(np.bincount(columns, mass, len(b)) - b).sum()
    certificate = Certificate(
        primal=best[0],
        dual=min(dual, best[0]),
        marginal_error=float(off),
        iterations=directions,
        converged=bool(off < 1e-9),
        solver="sliced",
        milliseconds=(time.perf_counter() - started) * 1e3,
    )
    certificate.require_converged()
    return TransportPlan(problem.shape, certificate, rows=rows, columns=columns, mass=mass)


def _projected(problem: TransportProblem, directions: int, seed: int) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Project both sets on random unit vectors.

    Returns:
        Coordinates, (directions, n) and (directions, m) float64, relative to the mean of the targets; the dimension of
        the points; and their largest distance from that mean.
    """
    if problem.x is None or problem.y is None or problem.cost != "squared-euclidean" or problem.epsilon > 0:
        raise ProblemError(
            f"projections bound the squared Euclidean cost of points at epsilon 0, received {problem.cost}",
            hint="use solver 'auto'",
        )
    if directions < 1:
        raise ProblemError(f"directions: {directions} received", hint="give at least 1")
    x, y = (torch.as_tensor(side).cpu().double() for side in (problem.x, problem.y))
    vectors = torch.randn(x.shape[1], directions, generator=step_generator(seed, 0, "directions"), dtype=torch.float64)
    vectors /= vectors.norm(dim=0)
    centre = y.mean(0)
    x, y = x - centre, y - centre
    largest = max(float(side.norm(dim=1).max()) for side in (x, y))
    return (x @ vectors).T.numpy(), (y @ vectors).T.numpy(), x.shape[1], largest
