"""Bounds on the optimum of an exact problem from a plan and target potentials: Kantorovich's duality in float64.

For every plan P with marginals a and b and all potentials with ``f_i + g_j ≤ C_ij``,
``Σ a f + Σ b g ≤ optimum ≤ <P, C>`` (Peyré & Cuturi 2019, prop. 2.4). Both sides are rounded outwards by the bounds of
:mod:`pipelines.transport.rounding`, so that they hold whatever the solver did and however its numbers were rounded.
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
"""Gap over which a plan is not taken for optimal, relative to its own cost ``Σ P |C|``."""

SHARP = 1e-10
"""Relative gap under which no more is gained by looking at single costs more closely."""

MARGINAL_TOLERANCE = 1e-9
"""Marginal error of an exact plan that is taken for rounding."""


@dataclass(frozen=True, eq=False)
class ExactBounds:
    """What is proven.

    Attributes:
        primal: an upper bound of the optimum: the cost of the plan, rounded to its marginals.
        dual: a lower bound.
        marginal_error: ``‖P 1 − a‖₁ + ‖Pᵀ 1 − b‖₁``.
        size: ``Σ P |C|``, in which gaps are measured; where it is 0, the least cost that is not.
        f, g: the potentials of the lower bound, (n,) and (m,), feasible for all pairs.
        resolution: how far apart the bounds on the costs that the plan pays are, as :func:`resolution_of` says.
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
        """Whether the gap is within :data:`GAP_TOLERANCE` of ``size``, beyond what the cost itself is known to."""
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
    """The entries of a plan that has zero entries."""
    rows, columns, mass = plan.entries()
    counts = np.bincount(columns, minlength=plan.shape[1])
    return Entries(rows, columns, mass, plan.assignment is not None and bool((counts == 1).all()))


def exact_bounds(
    problem: TransportProblem, entries: Entries, g: np.ndarray | None, cost: TrueCost | None = None
) -> ExactBounds:
    """Bounds from the entries of a plan and any target potentials.

    One blocked pass over all pairs, in memory O(n + m) beyond the points; a second one, in which the pairs that decide
    are computed from differences, where the first leaves a gap.

    Args:
        problem: epsilon 0.
        entries: of the plan.
        g: (m,) target potentials, optimal or not; None where nothing is known of them.
        cost: of the problem, if it is there already.
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
        # No plan costs less than its mass times the least cost: all there is to say where a plan costs nothing.
        f, g, dual = np.full(len(a), least), np.zeros(len(b)), least
    elif (b == 0).any():
        g = _complete(cost, b, f, g)
    # Both bounds are infinite where the plan keeps a forbidden pair; its primal cost is infinite as well.
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
    """A solver's answer as a plan with its certificate.

    Args:
        problem: epsilon 0.
        assignment: (n,) target of each source; or
        entries: rows, columns and mass.
        g: (m,) target potentials; None where the solver has none.
        cost: of the problem, if it is there already.
        solver: its name.
        iterations: in its own unit.
        started: ``time.perf_counter()`` when it began.
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
    """What is not known of a plan's cost: next to nothing, but for cosines of nearly parallel vectors.

    Float64 knows a direction to some units, and with it each cosine; no gap can be closed further than by that.

    Args:
        problem: that the plan solves.
        mass: (k,), of its entries.
        apart: (k,), upper minus lower bounds of their costs.
    """
    if problem.matrix is None and problem.cost == "cosine":
        return float(mass.sum() * apart.max(initial=0.0))
    return float(mass @ apart)


def certificate_of(bounds: ExactBounds, *, solver: str, iterations: int, started: float) -> Certificate:
    """The certificate of an exact plan; it has converged where its gap is closed."""
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
    """A plan scaled down to at most its marginals, and what they then miss."""

    mass: np.ndarray
    error: float
    missing_a: np.ndarray | None
    missing_b: np.ndarray | None


def _round(entries: Entries, a: np.ndarray, b: np.ndarray) -> _Rounded:
    """Altschuler, Weed & Rigollet (2017), algorithm 2, up to the product that fills the missing masses."""
    if entries.permutation and len(a) == len(b) and np.ptp(a) == np.ptp(b) == 0:
        return _Rounded(entries.mass, 0.0, None, None)
    rows, columns, mass = entries.rows, entries.columns, entries.mass
    sent, met = np.bincount(rows, mass, len(a)), np.bincount(columns, mass, len(b))
    error = float(np.abs(sent - a).sum() + np.abs(met - b).sum())
    if error <= 4 * rounding.U64 * (len(a) + len(b)):
        # The marginals themselves are known no better: 1/3 has no float64, and three of them need not sum to 1.
        return _Rounded(mass, error, None, None)
    mass = mass * np.minimum(1, a / np.where(sent > 0, sent, 1))[rows]
    met = np.bincount(columns, mass, len(b))
    mass = mass * np.minimum(1, b / np.where(met > 0, met, 1))[columns]
    # Sums of k numbers are known to k units only: at least that much counts as missing.
    missing_a = np.maximum(a - np.bincount(rows, mass, len(a)), 0)
    missing_b = np.maximum(b - np.bincount(columns, mass, len(b)), 0)
    missing_a += rounding.gamma(2) * np.bincount(rows, minlength=len(a)) * a
    missing_b += rounding.gamma(2) * np.bincount(columns, minlength=len(b)) * b
    return _Rounded(mass, error, missing_a, missing_b)


def _feasible(
    cost: TrueCost, a: np.ndarray, b: np.ndarray, g: np.ndarray, rounded: _Rounded
) -> tuple[np.ndarray, float, float]:
    """Source potentials that are feasible with ``g``, the least cost, and the cost of what the marginals miss."""
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
        # Twice: the block has lower bounds, and the two sides' sums differ by rounding. Where a forbidden pair is hit
        # the plan's own marginals stand, which are off by rounding alone.
        repair = 2 * repair / total if math.isfinite(repair) and total > 0 else 0.0
    return _lowered(f, g), least, repair


def _refine(cost: TrueCost, b: np.ndarray, g: np.ndarray, entries: Entries, low: np.ndarray) -> np.ndarray:
    """The same source potentials, from pairs computed by differences wherever a block's error could decide."""
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
    """The least ``|C_ij|`` that is not 0; 1 if all are."""
    least = math.inf
    for start in range(0, cost.shape[0], cost.height):
        block = cost.block(start, min(start + cost.height, cost.shape[0])).abs()
        least = min(least, float(torch.where(block > 0, block, math.inf).amin()))
    return least if math.isfinite(least) else 1.0


def _complete(cost: TrueCost, b: np.ndarray, f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """``g`` with feasible potentials for targets without weight, which no bound depends on."""
    least = torch.full((len(b),), math.inf, dtype=torch.float64, device=cost.device)
    for start in range(0, len(f), cost.height):
        stop = min(start + cost.height, len(f))
        block = cost.lower(start, stop).sub_(torch.as_tensor(f[start:stop, None], device=cost.device))
        least = torch.minimum(least, block.amin(0))
    filled = least.cpu().numpy()
    filled -= 4 * rounding.U64 * (np.abs(filled) + np.abs(f).max())
    return np.where(b > 0, g, np.where(np.isfinite(filled), filled, 0.0))


def _lowered(f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """``f`` less the rounding of the subtraction that made it; 0 for a source whose pairs are all forbidden."""
    f = np.where(np.isfinite(f), f, 0.0)
    return f - 4 * rounding.U64 * np.abs(f)


def _value(a: np.ndarray, b: np.ndarray, f: np.ndarray, g: np.ndarray) -> float:
    """The dual objective, rounded down; each side per unit of its own mass."""
    of_rows, first = rounding.weighted_sum(a, f)
    of_columns, second = rounding.weighted_sum(b, g)
    # Float64 weights sum to 1 up to n units.
    drift = (abs(of_rows) * abs(math.fsum(a) - 1) + abs(of_columns) * abs(math.fsum(b) - 1)) * 2
    return rounding.at_least(of_rows + of_columns, (first, second, drift, 2 * rounding.U64 * abs(of_rows + of_columns)))
