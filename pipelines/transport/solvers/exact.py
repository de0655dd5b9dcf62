"""Monge's problem between uniform sets of equal size, without computing the full cost matrix.

Most costs cannot affect an optimal assignment. A cheap screen (a matrix product, in bfloat16 if the processor supports
it) finds the pairs that can; only their costs are computed exactly, in float64 from the points. All other costs are
bounded from below, so the result is optimal for the exact costs. The same bounds prove that the dual potentials are
feasible over the whole matrix: ``f_i`` is at most the lower bound of ``C_ij − g_j`` over the unlisted pairs of row i,
and at most the exact ``C_ij − g_j`` of each listed pair. Both are reduced by the possible rounding error
(:mod:`pipelines.transport.rounding`). ``native/solver.h`` describes the solver.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipelines.errors import ProblemError
from pipelines.spec import CostName
from pipelines.transport import native
from pipelines.transport.exact_bounds import SHARP, ExactBounds, certificate_of, certified
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.rounding import U64, at_least, at_most, of_cosine, sum_of
from pipelines.transport.solvers import assignment
from pipelines.transport.solvers import screen as screens
from pipelines.transport.solvers.duality import potentials_of_assignment
from pipelines.transport.true_cost import cost_matrix, on_sphere

READINGS = 12
"""Maximum number of full row reads, as a multiple of n; beyond it, dense shortest paths are faster. Image data need 1.1
to 1.5 n."""

LOOKS = 256
"""Maximum number of candidate list entries that shortest paths read, as a multiple of n²; beyond it, dense shortest
paths are faster. Image data need 0.1, points in the plane 1, Cauchy tails 13, two clusters far apart 90."""

SAMPLED_ROWS = 24
CANDIDATES = 32
MOST_TIES = 0.75
"""Fraction of tied candidates in a row above which candidate lists become as long as rows."""


def solve(problem: TransportProblem, *, g: np.ndarray | None = None) -> TransportPlan:
    """Compute an optimal permutation with potentials that prove it.

    If the screens are not effective (many equal costs, heavy tails), or without the native build, lapx solves the
    problem with the float64 cost matrix.

    Args:
        problem: problem with uniform weights, equally many points on both sides, and epsilon 0.
        g: initial target potentials, (n,), e.g. of an earlier plan between nearly the same points.

    Raises:
        ProblemError: if the problem is of another kind, or ``g`` has another shape.
    """
    started = time.perf_counter()
    n, m = problem.shape
    if not problem.is_assignment:
        raise ProblemError(
            f"an assignment has uniform weights, as many points on both sides and epsilon 0; received {n} × {m}",
            hint="use solver 'auto'",
        )
    if g is not None and (np.shape(g) != (n,) or not np.isfinite(g).all()):
        raise ProblemError(f"g: finite potentials of shape ({n},) expected, received shape {np.shape(g)}")
    if not native.native_available():
        return _by_lapx(problem, "no native build")
    if obstacle := _obstacle(problem):
        return _by_lapx(problem, obstacle)
    for screened in screens_of(problem):
        start = None if g is None else (g / screened.unit - screened.column).astype(np.float32)
        if start is not None and not np.isfinite(start).all():
            start = None
        solution = native.assign(screened.screen, screened.points, start, budget=READINGS * n, looks=LOOKS * n * n)
        if solution.status != "solved":
            continue
        plan = _plan(problem, screened, solution, started)
        if plan.certificate.converged:
            return plan
    return _by_lapx(problem, "candidate lists would not stay short")


def solve_batch(problems: Sequence[TransportProblem], *, threads: int | None = None) -> list[TransportPlan]:
    """Solve many problems at once, each on one thread.

    Limits torch to one thread during the call, because two thread pools on the same cores block each other.

    Args:
        problems: problems as for :func:`solve`.
        threads: number of threads; the number of processors by default.

    Raises:
        ProblemError: the first error of any problem.
    """
    threads = min(threads or os.cpu_count() or 1, len(problems))
    if threads <= 1:
        return [solve(problem) for problem in problems]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(solve, problems))
    finally:
        torch.set_num_threads(before)


def _obstacle(problem: TransportProblem) -> str:
    """Return why dense shortest paths are faster for a cost matrix, judged by a sample of rows; "" if they are not."""
    if problem.matrix is None:
        return ""
    matrix, n = screens.as_numpy(problem.matrix), problem.shape[0]
    if np.isinf(matrix).any():
        return "forbidden pairs"
    rows = np.sort(matrix[:: max(1, n // SAMPLED_ROWS)], axis=1)[:, : CANDIDATES + 1]
    return "many equal costs" if n > CANDIDATES and (np.diff(rows) == 0).mean() > MOST_TIES else ""


def screens_of(problem: TransportProblem) -> Iterator[screens.Screened]:
    """Yield the screens to try, the cheapest first; each is computed on demand."""
    if problem.matrix is not None:
        yield screens.from_matrix(screens.as_numpy(problem.matrix))
        return
    if problem.cost == "power":
        yield screens.from_matrix(cost_matrix(problem).numpy())
        return
    x, y = (torch.as_tensor(side).cpu() for side in (problem.x, problem.y))
    if problem.cost == "cosine":
        (x, row), (y, column) = on_sphere(x.double()), on_sphere(y.double())
        for screened in _screens_of_points(x.numpy(), y.numpy(), "squared-euclidean"):
            # The cost is half the squared distance, plus a constant for a point at the origin.
            unit = screened.unit / 2
            rows, columns = (
                side + shift.numpy() / unit for side, shift in ((screened.row, row), (screened.column, column))
            )
            yield dataclasses.replace(
                screened, unit=unit, row=rows, column=columns, shift=float(row.sum() + column.sum())
            )
        return
    yield from _screens_of_points(x.numpy(), y.numpy(), problem.cost)


def _screens_of_points(x: np.ndarray, y: np.ndarray, cost: CostName) -> Iterator[screens.Screened]:
    if x.shape[1] > screens.FEW_COORDINATES:
        if cost == "euclidean":
            yield screens.from_distances(x, y)
        else:
            if native.has_bfloat16():
                yield screens.from_products(x, y, bfloat16=True)
            yield screens.from_products(x, y, bfloat16=False)
    yield screens.from_differences(x, y, root=cost == "euclidean")


def _plan(
    problem: TransportProblem, screened: screens.Screened, solution: native.ExactSolution, started: float
) -> TransportPlan:
    """Certify the solver's result by its own bounds or, if these leave a gap, by a pass over all costs."""
    effort = solution.bids + solution.pops
    slack = of_cosine(problem.x.shape[1]) if problem.cost == "cosine" and problem.x is not None else (0.0, 0.0, 0.0)
    # Costs are at most 2, and so is |u − v|.
    bounds = _own_bounds(screened, solution, 2 * slack[0] + 2 * slack[1] + slack[2])
    if problem.cost == "power" or bounds is None or bounds.gap > SHARP:
        found: dict[str, Any] = {
            "assignment": solution.assignment,
            "solver": "exact",
            "iterations": effort,
            "started": started,
        }
        plan = certified(problem, g=screened.unit * (solution.g + screened.column), **found)
        if not plan.certificate.converged:
            # For distant clusters, the solver's potentials are so large that they lose the digits of small costs.
            g = potentials_of_assignment(cost_matrix(problem).cpu().numpy(), solution.assignment)
            plan = certified(problem, g=g, **found)
        return plan
    certificate = certificate_of(bounds, solver="exact", iterations=effort, started=started)
    return TransportPlan(problem.shape, certificate, assignment=solution.assignment, f=bounds.f, g=bounds.g)


def _own_bounds(screened: screens.Screened, solution: native.ExactSolution, slack: float) -> ExactBounds | None:
    """Compute bounds from the solver's potentials, which are feasible up to the rounding of their last sums.

    Args:
        screened: input of the solver.
        solution: solution with status ``solved``.
        slack: maximum difference between the solver's costs and the true ones, beyond their rounding.
    """
    n = len(solution.assignment)
    if not (np.bincount(solution.assignment, minlength=n) == 1).all():
        return None
    unit, row, column = screened.unit, screened.row, screened.column
    largest = np.abs(solution.g).max() + np.abs(column).max()
    f = -slack + unit * (solution.f + row - 8 * U64 * (np.abs(solution.f) + np.abs(row) + largest))
    g = unit * (solution.g + column)
    rounding = screened.points.rounding if screened.points else 0.0
    value, error = sum_of(np.append(unit * solution.matched, screened.shift) / n)
    size = unit / n * float(np.abs(solution.matched).sum())
    (of_rows, first), (of_columns, second) = sum_of(f / n), sum_of(g / n)
    dual = at_least(of_rows + of_columns, (first, second))
    primal = max(at_most(value, (error, rounding * size, slack)), dual)
    return ExactBounds(primal, dual, 0.0, size, f, g) if np.isfinite((primal, dual)).all() else None


def _by_lapx(problem: TransportProblem, reason: str) -> TransportPlan:
    plan = assignment.solve(problem)
    return dataclasses.replace(plan, certificate=dataclasses.replace(plan.certificate, reason=reason))
