"""Monge's problem between uniform sets of equal size, at less than the price of its cost matrix.

Most costs cannot matter to an optimal assignment. A cheap screen (a matrix product in bfloat16 where the processor has
it) finds those that may; only these are computed exactly, from the points themselves in float64. What the screen leaves
out is bounded, so that the answer is optimal for the exact costs, and the same bounds prove its dual potentials
feasible over the whole matrix: each row's ``f_i`` is at most its bound, under every unlisted ``C_ij − g_j``, and at
most every listed one, which is looked at. The solver itself is described in ``native/solver.h``.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipelines.errors import ProblemError
from pipelines.transport import native
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import assignment
from pipelines.transport.solvers import screen as screens

RELATIVE_GAP = 1e-9
"""Duality gap at which the solver counts as converged, relative to costs and potentials: float64 leaves about 1e-15."""

READINGS = 12
"""Times n rows read in full: past them, dense shortest paths are the better method. Image data take 1.1 to 1.5 n."""

LOOKS = 256
"""Times n² entries of candidate lists that shortest paths look at: an end to what is slower than dense ones. Image data
take 0.1, points in the plane 1, Cauchy tails 13, two clusters far apart 90."""

SAMPLED_ROWS = 24
CANDIDATES = 32
MOST_TIES = 0.75
"""Share of the candidates of a row that cost the same as the next, from which lists grow as long as rows."""


def solve(problem: TransportProblem, *, g: np.ndarray | None = None) -> TransportPlan:
    """An optimal permutation, with potentials that prove it.

    Exact for the float64 costs between the given float32 points, or for the given cost matrix. Where the data defeat
    the screens (many equal costs, heavy tails), or without the native build, lapx solves the float32 cost matrix.

    Args:
        problem: uniform weights, as many points on both sides, epsilon 0.
        g: (n,) target potentials of an earlier plan between nearly the same points, to start from.

    Raises:
        ProblemError: another kind of problem, or ``g`` of another shape.
    """
    started = time.perf_counter()
    n, m = problem.shape
    if not problem.is_assignment:
        raise ProblemError(
            f"an assignment has uniform weights, as many points on both sides and epsilon 0; received {n} × {m}",
            cure="use solver 'auto'",
        )
    if g is not None and (np.shape(g) != (n,) or not np.isfinite(g).all()):
        raise ProblemError(f"g: finite potentials of shape ({n},) expected, received shape {np.shape(g)}")
    if not native.native_available():
        return _by_lapx(problem, "no native build")
    if obstacle := _obstacle(problem):
        return _by_lapx(problem, obstacle)
    for screened in screens_of(problem):
        start = None if g is None else (g / screened.unit - screened.column).astype(np.float32)
        solution = native.assign(screened.screen, screened.points, start, budget=READINGS * n, looks=LOOKS * n * n)
        if solution.status == "solved":
            return _plan(screened, solution, started)
    return _by_lapx(problem, "candidate lists would not stay short")


def solve_batch(problems: Sequence[TransportProblem], *, threads: int | None = None) -> list[TransportPlan]:
    """Solve many problems at once, each on one thread.

    Torch's own threads are set to one for as long as it runs: two teams on the same cores wait for each other.

    Args:
        problems: as for :func:`solve`.
        threads: how many; the number of processors by default.

    Raises:
        ProblemError: the first one that a problem raises.
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
    """Why dense shortest paths are the better method for a cost matrix, by a look at some rows; "" if they are not."""
    if problem.matrix is None:
        return ""
    n = problem.shape[0]
    rows = np.sort(screens.as_numpy(problem.matrix[:: max(1, n // SAMPLED_ROWS)]), axis=1)[:, : CANDIDATES + 1]
    return "many equal costs" if n > CANDIDATES and (np.diff(rows) == 0).mean() > MOST_TIES else ""


def screens_of(problem: TransportProblem) -> Iterator[screens.Screened]:
    """Screens to try, the cheapest first; each is made when it is asked for."""
    if problem.matrix is not None:
        yield screens.from_matrix(problem)
        return
    assert problem.x is not None
    assert problem.y is not None
    x, y = screens.as_numpy(problem.x), screens.as_numpy(problem.y)
    constants = np.zeros(len(x)), np.zeros(len(y))
    if problem.cost == "cosine":
        (x, row), (y, column) = screens.on_sphere(x), screens.on_sphere(y)
        constants = row, column
    few = x.shape[1] <= screens.FEW_COORDINATES
    makers: list[Callable[[], screens.Screened]] = [
        lambda: screens.from_differences(x, y, root=problem.cost == "euclidean")
    ]
    if problem.cost == "euclidean" and not few:
        makers.insert(0, lambda: screens.from_distances(x, y))
    elif not few:
        makers.insert(0, lambda: screens.from_products(x, y, bfloat16=False))
        if native.has_bfloat16():
            makers.insert(0, lambda: screens.from_products(x, y, bfloat16=True))
    for make in makers:
        screened = make()
        if problem.cost == "cosine":
            unit = screened.unit / 2
            row, column = (
                side + shift / unit for side, shift in zip((screened.row, screened.column), constants, strict=True)
            )
            screened = dataclasses.replace(screened, unit=unit, row=row, column=column)
        yield screened


def _plan(screened: screens.Screened, solution: native.Solution, started: float) -> TransportPlan:
    n = len(solution.assignment)
    unit, row, column = screened.unit, screened.row, screened.column
    f, g = unit * (solution.f + row), unit * (solution.g + column)
    constants = float(row.sum() + column.sum())
    primal = unit / n * (float(solution.matched.sum()) + constants)
    dual = unit / n * (float(solution.f.sum() + solution.g.sum()) + constants)
    size = abs(primal) + sum(float(np.abs(side).sum()) for side in (f, g, unit * row, unit * column)) / n
    taken = np.bincount(solution.assignment, minlength=n)
    certificate = Certificate(
        primal=primal,
        dual=dual,
        marginal_error=float(np.abs(taken - 1).sum()) / n,
        iterations=solution.bids + solution.pops,
        converged=primal - dual <= RELATIVE_GAP * size and bool((taken == 1).all()),
        solver="exact",
        milliseconds=(time.perf_counter() - started) * 1e3,
    )
    return TransportPlan((n, n), certificate, assignment=solution.assignment, f=f, g=g)


def _by_lapx(problem: TransportProblem, reason: str) -> TransportPlan:
    plan = assignment.solve(problem)
    return dataclasses.replace(plan, certificate=dataclasses.replace(plan.certificate, reason=reason))
