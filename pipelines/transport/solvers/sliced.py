"""The sliced distance: transport on the line, averaged over directions."""

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
    """Mean squared Wasserstein distance of projections on random directions (Bonneel et al. 2015, eq. 4).

    At most the squared Euclidean transport cost divided by the dimension, in the limit of many directions.

    Raises:
        ProblemError: another cost than the squared Euclidean, or no points.
    """
    x, y, _, _ = _projected(problem, directions, seed)
    total = 0.0
    for left, right in zip(x, y, strict=True):
        rows, columns, mass = sorted_plan(left, right, problem.a, problem.b)
        total += float(mass @ (left[rows] - right[columns]) ** 2)
    return total / directions


def solve(problem: TransportProblem, *, directions: int = DIRECTIONS, seed: int = 0) -> TransportPlan:
    """The best of the plans that sorted projections make (Mahey et al. 2023, "min-SWGG", eq. 8).

    A plan in O(n log n) for each direction. Its certificate says how good it is by bounds that hold: ``primal`` is the
    plan's own cost between the points, an upper bound of the optimum; ``dual`` is the largest cost of transport
    between projections, a lower one, as projections bring points closer. Nothing promises that the two are near.
    ``converged`` says that the plan has its marginals, which it has by construction, and not that it is optimal.

    Raises:
        ProblemError: another cost than the squared Euclidean, epsilon > 0, or no points.
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
    # Each computed coordinate is within γ |x − c| of that of the true projection, so the distance of two sets is off by
    # twice that at most (Minkowski's inequality); directions have length 1 up to rounding, too.
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
    """Coordinates of both sets along random unit vectors, (directions, n) and (directions, m) float64.

    With the dimension of the points, and their largest distance from the mean of the targets, where the origin lies.
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
