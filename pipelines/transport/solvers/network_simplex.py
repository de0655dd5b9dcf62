"""Kantorovich's linear programme: weighted and rectangular problems, by POT's network simplex."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.errors import ProblemError
from pipelines.transport import rounding
from pipelines.transport.exact_bounds import SHARP, certified
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers.duality import potentials_of_plan
from pipelines.transport.true_cost import TrueCost, cost_matrix

MAX_PIVOTS = 100_000_000
"""POT's own limit of 100,000 pivots stops short of the optimum from n ≈ 2048 on, with no more than a warning."""

CAPS = (2.0**8, 2.0**16, 2.0**24, 2.0**32, 2.0**40)
"""Multiples of the costs that every plan has to pay at least, at which larger costs are cut in turn."""

FORBIDDEN_MASS = 1e-9
"""Mass along forbidden pairs that is taken for rounding."""

SimplexResult = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]
"""Rows, columns and mass of the entries, target potentials, and the number of pivots."""


def solve(problem: TransportProblem) -> TransportPlan:
    """An optimal plan with at most n + m − 1 non-zero entries (Dantzig's simplex on the transport polytope).

    Peyré & Cuturi (2019), section 3.5. Points of zero weight are left out of the solve and get feasible potentials.

    The simplex computes in float64: one cost of 1e16 leaves no digits for costs of 1 beside it. Where the certificate
    shows a gap, and where pairs are forbidden, costs are cut at a cap. A plan of the capped costs that uses no capped
    pair is optimal for the costs themselves, and its potentials are feasible for them; otherwise the cap is raised.

    Raises:
        ProblemError: epsilon > 0, or every plan uses forbidden pairs.
    """
    started = time.perf_counter()
    if problem.epsilon > 0:
        raise ProblemError(f"epsilon: {problem.epsilon:g} received by an exact solver", hint="use solver 'auto'")
    program = _Program.of(problem, cost_matrix(problem).cpu().numpy())
    forbidden = not np.isfinite(program.costs).all()
    if forbidden:
        program.check_feasible()
    best = None if forbidden else _plan(problem, program.run(None), None, started)
    if best is not None and best.certificate.relative_gap <= SHARP:
        return best
    direct = TrueCost(problem, direct=True)
    if problem.matrix is None:
        program = _Program.of(problem, cost_matrix(problem, direct=True).cpu().numpy())
    for cap in program.caps():
        plan = _plan(problem, program.run(cap), direct, started)
        if best is None or plan.certificate.gap < best.certificate.gap:
            best = plan
        if best.certificate.converged and best.certificate.relative_gap <= SHARP:
            break
    assert best is not None
    if best.certificate.converged:
        return best
    # Potentials that were found beside far larger costs have lost their digits; the plan may be optimal all the same.
    rows, columns, mass = best.entries()
    g = np.zeros(problem.shape[1])
    places = np.searchsorted(program.sources, rows), np.searchsorted(program.targets, columns)
    g[program.targets] = potentials_of_plan(program.costs, *places) + program.columns
    proven = _plan(problem, (rows, columns, mass, g, best.certificate.iterations), direct, started)
    return proven if proven.certificate.gap < best.certificate.gap else best


def check_feasible(problem: TransportProblem) -> None:
    """Refuse forbidden pairs that every plan would need.

    Raises:
        ProblemError: with the least mass along them.
    """
    _Program.of(problem, cost_matrix(problem).cpu().numpy()).check_feasible()


def _plan(problem: TransportProblem, found: SimplexResult, cost: TrueCost | None, started: float) -> TransportPlan:
    rows, columns, mass, g, pivots = found
    return certified(
        problem,
        entries=(rows, columns, mass),
        g=g,
        cost=cost,
        solver="network-simplex",
        iterations=pivots,
        started=started,
    )


@dataclass(frozen=True, eq=False)
class _Program:
    """The problem between the points that have weight, its costs less the least of each row, then of each column."""

    costs: np.ndarray
    columns: np.ndarray
    a: np.ndarray
    b: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    size: int

    @classmethod
    def of(cls, problem: TransportProblem, costs: np.ndarray) -> _Program:
        a, b = problem.source_weights(), problem.target_weights()
        sources, targets = np.flatnonzero(a), np.flatnonzero(b)
        inner = costs[np.ix_(sources, targets)]
        # Constants of rows and columns leave plans as they are. Without them costs are ≥ 0, which POT asks for, and a
        # point that is far from all others does not set the unit in which the others are compared.
        inner = inner - _finite(inner.min(1))[:, None]
        least = _finite(inner.min(0))
        return cls(inner - least, least, a[sources], b[targets], sources, targets, len(b))

    def run(self, cap: float | None) -> SimplexResult:
        """Rows, columns and mass of the entries, target potentials, and the number of pivots."""
        costs = self.costs if cap is None else np.minimum(self.costs, cap)
        unit = float(costs.max()) or 1.0
        plan, log = _simplex(self.a, self.b, costs / unit)
        # What rounding leaves of a weight is no entry, nor what it leaves on a forbidden pair.
        least = np.where(np.isfinite(self.costs), rounding.of_masses(self.a, self.b), FORBIDDEN_MASS)
        rows, columns = np.nonzero(plan > least)
        g = np.zeros(self.size)
        g[self.targets] = unit * log["v"] + self.columns
        return self.sources[rows], self.targets[columns], plan[rows, columns], g, int(log.get("numIter", 0))

    def caps(self) -> list[float | None]:
        """Where to cut costs: from the dearest of the cheapest pairs up; not at all, last, where all are finite."""
        least = max(float(self.costs.min(1).max()), float(self.costs.min(0).max()))
        finite = self.costs[np.isfinite(self.costs)]
        least = least or float(finite[finite > 0].min(initial=np.inf))
        most = float(finite.max())
        if not np.isfinite(least) or most == 0:  # all finite costs are equal
            return [1.0]
        caps: list[float | None] = [cap * least for cap in CAPS if cap * least < most]
        return [*caps, 4 * most * min(self.costs.shape)] if not np.isfinite(self.costs).all() else [*caps, None]

    def check_feasible(self) -> None:
        """Refuse forbidden pairs that every plan would need.

        Raises:
            ProblemError: with the least mass along them.
        """
        crossing = (~np.isfinite(self.costs)).astype(np.float64)
        plan, _ = _simplex(self.a, self.b, crossing)
        needed = float((plan * crossing).sum())
        if needed > FORBIDDEN_MASS:
            raise ProblemError(
                f"matrix: infeasible: every plan moves at least {needed:.3g} of the mass along forbidden pairs",
                hint="allow more pairs (+inf forbids one), or see partial transport",
            )


def _finite(least: np.ndarray) -> np.ndarray:
    """The least costs of rows or columns, 0 where all pairs are forbidden."""
    return np.where(np.isfinite(least), least, 0.0)


def _simplex(a: np.ndarray, b: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    import ot  # it imports scikit-learn: half a second that most processes need not spend

    with warnings.catch_warnings():
        # Its warnings are about convergence, which the certificate decides.
        warnings.simplefilter("ignore")
        plan, log = ot.emd(
            a, b, np.ascontiguousarray(costs), numItermax=MAX_PIVOTS, log=True, center_dual=False, numThreads=1
        )
    return plan, log
