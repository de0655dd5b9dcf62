"""Kantorovich's linear programme for weighted and rectangular problems, by POT's network simplex."""

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
"""Maximum number of pivots. POT's default of 100,000 stops before the optimum from n ≈ 2048 on, with only a warning."""

CAPS = (2.0**8, 2.0**16, 2.0**24, 2.0**32, 2.0**40)
"""Caps for large costs, tried in turn, as multiples of the largest cost that every plan must pay."""

FORBIDDEN_MASS = 1e-9
"""Mass on forbidden pairs below which it counts as rounding."""

SimplexResult = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]
"""Rows, columns and mass of the entries, target potentials, number of pivots."""


def solve(problem: TransportProblem) -> TransportPlan:
    """Compute an optimal plan with at most n + m − 1 non-zero entries (Dantzig's simplex on the transport polytope).

    Peyré & Cuturi (2019), section 3.5. Points of zero weight are excluded from the solve and get feasible potentials.

    The simplex computes in float64, so a cost of 1e16 leaves no digits for costs near 1. If the certificate shows a
    gap, or if pairs are forbidden, costs are capped. A plan for the capped costs that uses no capped pair is optimal
    for the original costs, and its potentials are feasible for them; otherwise the cap is raised.

    Raises:
        ProblemError: if epsilon > 0, or if every plan uses forbidden pairs.
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
    # Much larger costs in the same problem remove digits from the potentials; the plan may still be optimal.
    rows, columns, mass = best.entries()
    g = np.zeros(problem.shape[1])
    places = np.searchsorted(program.sources, rows), np.searchsorted(program.targets, columns)
    g[program.targets] = potentials_of_plan(program.costs, *places) + program.columns
    proven = _plan(problem, (rows, columns, mass, g, best.certificate.iterations), direct, started)
    return proven if proven.certificate.gap < best.certificate.gap else best


def check_feasible(problem: TransportProblem) -> None:
    """Check that a plan without forbidden pairs exists.

    Raises:
        ProblemError: if there is no such plan; the message states the minimum mass on forbidden pairs.
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
    """The problem between points with weight, with the minimum of each row, then column, subtracted from the costs."""

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
        # Row and column constants do not change plans. Without them, costs are ≥ 0, as POT requires, and a single
        # distant point does not determine the scale of all costs.
        inner = inner - _finite(inner.min(1))[:, None]
        least = _finite(inner.min(0))
        return cls(inner - least, least, a[sources], b[targets], sources, targets, len(b))

    def run(self, cap: float | None) -> SimplexResult:
        """Run the simplex with costs capped at ``cap``."""
        costs = self.costs if cap is None else np.minimum(self.costs, cap)
        unit = float(costs.max()) or 1.0
        plan, log = _simplex(self.a, self.b, costs / unit)
        # Rounding residues of weights, or on forbidden pairs, are not entries.
        least = np.where(np.isfinite(self.costs), rounding.of_masses(self.a, self.b), FORBIDDEN_MASS)
        rows, columns = np.nonzero(plan > least)
        g = np.zeros(self.size)
        g[self.targets] = unit * log["v"] + self.columns
        return self.sources[rows], self.targets[columns], plan[rows, columns], g, int(log.get("numIter", 0))

    def caps(self) -> list[float | None]:
        """Return the caps to try, from the largest minimum cost upwards; None (no cap) is last if all are finite."""
        least = max(float(self.costs.min(1).max()), float(self.costs.min(0).max()))
        finite = self.costs[np.isfinite(self.costs)]
        least = least or float(finite[finite > 0].min(initial=np.inf))
        most = float(finite.max())
        if not np.isfinite(least) or most == 0:  # all finite costs are equal
            return [1.0]
        caps: list[float | None] = [cap * least for cap in CAPS if cap * least < most]
        return [*caps, 4 * most * min(self.costs.shape)] if not np.isfinite(self.costs).all() else [*caps, None]

    def check_feasible(self) -> None:
        """Check that a plan without forbidden pairs exists.

        Raises:
            ProblemError: if there is no such plan; the message states the minimum mass on forbidden pairs.
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
    """Replace infinite minima, of rows or columns whose pairs are all forbidden, by 0."""
    return np.where(np.isfinite(least), least, 0.0)


def _simplex(a: np.ndarray, b: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    import ot  # imported here because it imports scikit-learn, which takes half a second

    with warnings.catch_warnings():
        # POT warns about convergence, which the certificate checks.
        warnings.simplefilter("ignore")
        plan, log = ot.emd(
            a, b, np.ascontiguousarray(costs), numItermax=MAX_PIVOTS, log=True, center_dual=False, numThreads=1
        )
    return plan, log
