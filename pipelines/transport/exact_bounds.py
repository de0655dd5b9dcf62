"""Bounds on the optimum of an exact problem from a plan and target potentials: Kantorovich's duality in float64.

For every plan P with marginals a and b and all potentials with ``f_i + g_j ≤ C_ij``,
``Σ a f + Σ b g ≤ optimum ≤ <P, C>`` (Peyré & Cuturi 2019, prop. 2.4). Both sides are rounded outwards by the bounds of
:mod:`pipelines.transport.rounding`, so that they hold for any solver and any rounding of its numbers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.transport import rounding
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.true_cost import TrueCost

GAP_TOLERANCE = 1e-7
"""Largest gap of an optimal plan, relative to its cost ``Σ P |C|``."""

SHARP = 1e-10
"""Relative gap below which more precise costs bring no improvement."""

MARGINAL_TOLERANCE = 1e-9
"""Marginal error of an exact plan below which it counts as rounding."""


@dataclass(frozen=True, eq=False)
class ExactBounds:
    """Proven bounds on the optimum of an exact problem.

    Attributes:
        primal: upper bound of the optimum: the cost of the plan after rounding to its marginals.
        dual: lower bound of the optimum.
        marginal_error: ``‖P 1 − a‖₁ + ‖Pᵀ 1 − b‖₁``.
        size: ``Σ P |C|``, the unit of relative gaps; if it is 0, the smallest cost that is not 0.
        f, g: potentials of the lower bound, (n,) and (m,), feasible for all pairs.
        resolution: distance of the bounds on the plan's cost, see :func:`resolution_of`.
    """

    primal: float
    dual: float
    marginal_error: float
    size: float
    f: np.ndarray
    g: np.ndarray
    resolution: float = 0.0

    @property
    def closed(self) -> bool:
        """Whether the gap is at most :data:`GAP_TOLERANCE` times ``size``, plus the uncertainty of the cost."""
        return math.isfinite(self.primal) and self.primal - self.dual <= GAP_TOLERANCE * self.size + 4 * self.resolution

    @property
    def gap(self) -> float:
        """Primal minus dual, relative to ``size``."""
        gap = self.primal - self.dual
        if gap <= 0:
            return 0.0
        return gap / self.size if self.size > 0 else math.inf


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of a plan: (k,) int64, int64 and float64."""

    rows: np.ndarray
    columns: np.ndarray
    mass: np.ndarray
    permutation: bool


def entries_of(plan: TransportPlan) -> Entries:
    """Return the entries of a sparse plan."""
    rows, columns, mass = plan.entries()
    counts = np.bincount(columns, minlength=plan.shape[1])
    return Entries(rows, columns, mass, plan.assignment is not None and bool((counts == 1).all()))


def exact_bounds(
    problem: TransportProblem, entries: Entries, g: np.ndarray | None, cost: TrueCost | None = None
) -> ExactBounds:
    """Compute bounds from the entries of a plan and any target potentials.

    Makes one blocked pass over all pairs, in memory O(n + m) in addition to the points. If it leaves a gap, a second
    pass computes the decisive pairs from differences.

    Args:
        problem: problem with epsilon 0.
        entries: entries of the plan.
        g: target potentials, (m,), optimal or not; None if there are no potentials.
        cost: costs of the problem, if they are available.
    """
    cost = cost or TrueCost(problem)
    a, b = problem.source_weights(), problem.target_weights()
    low, high = cost.pairs(entries.rows, entries.columns)
    rounded = _round(entries, a, b)
    g = np.zeros(len(b)) if g is None else np.where(np.isfinite(g), g, 0.0)
    g = g - float(b @ g)  # smaller potentials have smaller errors
    f, least, repair = _feasible(cost, a, b, g, rounded)
    value, error = rounding.weighted_sum(rounded.mass, high)
    primal = rounding.at_most(value, (error, repair))
    size = float(rounded.mass @ np.abs(high)) or least_positive(cost)
    dual = _value(a, b, f, g)
    if primal - dual > SHARP * size:
        f = _refine(cost, b, g, entries, low)
        dual = _value(a, b, f, g)
    if least > dual:
        # No plan costs less than its mass times the smallest cost; this is the bound for a plan of cost 0.
        f, g, dual = np.full(len(a), least), np.zeros(len(b)), least
    elif (b == 0).any():
        g = _complete(cost, b, f, g)
    # If the plan uses a forbidden pair, both bounds and the primal cost are infinite.
    apart = np.subtract(high, low, out=np.zeros_like(high), where=high > low)
    resolution = resolution_of(problem, rounded.mass, apart)
    return ExactBounds(max(primal, dual), dual, rounded.error, size, f, g, resolution)


def certified(
    problem: TransportProblem,
    *,
    assignment: np.ndarray | None = None,
    entries: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    g: np.ndarray | None,
    cost: TrueCost | None = None,
    solver: str,
    iterations: int,
    started: float,
) -> TransportPlan:
    """Convert the result of a solver to a plan with a certificate.

    Args:
        problem: problem with epsilon 0.
        assignment: target of each source, (n,); alternative to ``entries``.
        entries: rows, columns and mass of the entries; alternative to ``assignment``.
        g: target potentials, (m,); None if the solver has none.
        cost: costs of the problem, if they are available.
        solver: name of the solver.
        iterations: number of iterations, in the solver's unit.
        started: ``time.perf_counter()`` at the start of the solver.
    """
    if assignment is not None:
        n = len(assignment)
        found = Entries(np.arange(n), assignment, np.full(n, 1 / n), len(np.unique(assignment)) == n)
    else:
        assert entries is not None
        found = Entries(*entries, False)
    bounds = exact_bounds(problem, found, g, cost)
    rows, columns, mass = (None, None, None) if assignment is not None else entries or (None, None, None)
    return TransportPlan(
        problem.shape,
        certificate_of(bounds, solver=solver, iterations=iterations, started=started),
        assignment=assignment,
        rows=rows,
        columns=columns,
        mass=mass,
        f=bounds.f,
        g=bounds.g,
    )


def resolution_of(problem: TransportProblem, mass: np.ndarray, apart: np.ndarray) -> float:
    """Compute the uncertainty of a plan's cost: nearly 0, except for cosines of nearly parallel vectors.

    Float64 represents a direction, and thus each cosine, up to a few units in the last place; the gap cannot be smaller
    than this.

    Args:
        problem: problem that the plan solves.
        mass: mass of the plan's entries, (k,).
        apart: upper minus lower bounds of their costs, (k,).
    """
    if problem.matrix is None and problem.cost == "cosine":
        return float(mass.sum() * apart.max(initial=0.0))
    return float(mass @ apart)


def certificate_of(bounds: ExactBounds, *, solver: str, iterations: int, started: float) -> Certificate:
    """Create the certificate of an exact plan; the plan has converged if its gap is closed."""
    return Certificate(
        primal=bounds.primal,
        dual=bounds.dual,
        marginal_error=bounds.marginal_error,
        iterations=iterations,
        converged=bounds.closed and bounds.marginal_error <= MARGINAL_TOLERANCE,
        solver=solver,
        milliseconds=(time.perf_counter() - started) * 1e3,
    )


@dataclass(frozen=True, eq=False)
class _Rounded:
    """A plan scaled down to at most its marginals, and the missing marginal masses."""

    mass: np.ndarray
    error: float
    missing_a: np.ndarray | None
    missing_b: np.ndarray | None


def _round(entries: Entries, a: np.ndarray, b: np.ndarray) -> _Rounded:
    """Round a plan by algorithm 2 of Altschuler, Weed & Rigollet (2017), without the product that adds missing mass."""
    if entries.permutation and len(a) == len(b) and np.ptp(a) == np.ptp(b) == 0:
        return _Rounded(entries.mass, 0.0, None, None)
    rows, columns, mass = entries.rows, entries.columns, entries.mass
    sent, met = np.bincount(rows, mass, len(a)), np.bincount(columns, mass, len(b))
    error = float(np.abs(sent - a).sum() + np.abs(met - b).sum())
    if error <= 4 * rounding.U64 * (len(a) + len(b)):
        # The marginals have the same error: 1/3 is not a float64 number, and three of them need not sum to 1.
        return _Rounded(mass, error, None, None)
    mass = mass * np.minimum(1, a / np.where(sent > 0, sent, 1))[rows]
    met = np.bincount(columns, mass, len(b))
    mass = mass * np.minimum(1, b / np.where(met > 0, met, 1))[columns]
    # Sums of k numbers have an error of up to k units; at least that much counts as missing.
    missing_a = np.maximum(a - np.bincount(rows, mass, len(a)), 0)
    missing_b = np.maximum(b - np.bincount(columns, mass, len(b)), 0)
    missing_a += rounding.gamma(2) * np.bincount(rows, minlength=len(a)) * a
    missing_b += rounding.gamma(2) * np.bincount(columns, minlength=len(b)) * b
    return _Rounded(mass, error, missing_a, missing_b)


def _feasible(
    cost: TrueCost, a: np.ndarray, b: np.ndarray, g: np.ndarray, rounded: _Rounded
) -> tuple[np.ndarray, float, float]:
    """Compute source potentials feasible with ``g``, the smallest cost, and the cost of the missing marginal mass."""
    offered = torch.as_tensor(np.where(b > 0, g, -math.inf), device=cost.device)
    missing = None if rounded.missing_b is None else torch.as_tensor(rounded.missing_b, device=cost.device)
    f = np.empty(len(a))
    least, repair = math.inf, 0.0
    for start in range(0, len(a), cost.height):
        stop = min(start + cost.height, len(a))
        block = cost.lower(start, stop)
        least = min(least, float(block.amin()))
        if missing is not None and rounded.missing_a is not None:
            repair += float(rounded.missing_a[start:stop] @ (block.abs() @ missing).cpu().numpy())
        f[start:stop] = block.sub_(offered).amin(1).cpu().numpy()
    if rounded.missing_b is not None and rounded.missing_a is not None:
        total = max(float(rounded.missing_a.sum()), float(rounded.missing_b.sum()))
        # Twice, because the block has lower bounds, and the sums of both sides differ by rounding. If this would use a
        # forbidden pair, the plan keeps its own marginals, whose error is only rounding.
        repair = 2 * repair / total if math.isfinite(repair) and total > 0 else 0.0
    return _lowered(f, g), least, repair


def _refine(cost: TrueCost, b: np.ndarray, g: np.ndarray, entries: Entries, low: np.ndarray) -> np.ndarray:
    """Refine source potentials: compute pairs from differences wherever the error of the block could be decisive."""
    n = cost.shape[0]
    offered = torch.as_tensor(np.where(b > 0, g, -math.inf), device=cost.device)
    reached = np.full(n, math.inf)
    np.minimum.at(reached, entries.rows, low - g[entries.columns])
    f = np.empty(n)
    for start in range(0, n, cost.height):
        stop = min(start + cost.height, n)
        block = cost.lower(start, stop).sub_(offered)
        doubtful = block < torch.as_tensor(reached[start:stop, None], device=cost.device)
        rows, columns = (places.cpu().numpy() for places in doubtful.nonzero(as_tuple=True))
        if len(rows):
            exact, _ = cost.pairs(rows + start, columns)
            block[doubtful] = torch.as_tensor(exact - np.where(b > 0, g, -math.inf)[columns], device=cost.device)
        f[start:stop] = block.amin(1).cpu().numpy()
    return _lowered(f, g)


def least_positive(cost: TrueCost) -> float:
    """Return the smallest non-zero ``|C_ij|``; 1 if all costs are 0."""
    least = math.inf
    for start in range(0, cost.shape[0], cost.height):
        block = cost.block(start, min(start + cost.height, cost.shape[0])).abs()
        least = min(least, float(torch.where(block > 0, block, math.inf).amin()))
    return least if math.isfinite(least) else 1.0


def _complete(cost: TrueCost, b: np.ndarray, f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Add feasible potentials for targets without weight to ``g``; no bound depends on them."""
    least = torch.full((len(b),), math.inf, dtype=torch.float64, device=cost.device)
    for start in range(0, len(f), cost.height):
        stop = min(start + cost.height, len(f))
        block = cost.lower(start, stop).sub_(torch.as_tensor(f[start:stop, None], device=cost.device))
        least = torch.minimum(least, block.amin(0))
    filled = least.cpu().numpy()
    filled -= 4 * rounding.U64 * (np.abs(filled) + np.abs(f).max())
    return np.where(b > 0, g, np.where(np.isfinite(filled), filled, 0.0))


def _lowered(f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Lower ``f`` by the rounding error of its subtraction; 0 for a source whose pairs are all forbidden."""
    f = np.where(np.isfinite(f), f, 0.0)
    return f - 4 * rounding.U64 * np.abs(f)


def _value(a: np.ndarray, b: np.ndarray, f: np.ndarray, g: np.ndarray) -> float:
    """Compute the dual objective, rounded down; each side is normalised to mass 1."""
    of_rows, first = rounding.weighted_sum(a, f)
    of_columns, second = rounding.weighted_sum(b, g)
    # Float64 weights sum to 1 up to n units.
    drift = (abs(of_rows) * abs(math.fsum(a) - 1) + abs(of_columns) * abs(math.fsum(b) - 1)) * 2
    return rounding.at_least(of_rows + of_columns, (first, second, drift, 2 * rounding.U64 * abs(of_rows + of_columns)))
