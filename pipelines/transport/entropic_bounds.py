"""Bounds on the entropic optimum from a pair of potentials, computed in float64 from the plan that is handed out.

The plan is ``P_ij = a_i b_j exp((f_i + g_j − C_ij) / epsilon)``. An error δ of an exponent changes its entry by a
factor within ``1 ± 1.01 |δ|`` for ``|δ| ≤ 0.02``; the sum ``η = Σ P |δ|`` over all entries therefore bounds what all of
them together can change: 1.01 η of any sum of masses. δ has two parts: the error of the cost (:class:`TrueCost`), over
epsilon; and the rounding of the exponent itself, at most ``4 u (|f| + |g| + |C|) / epsilon``, where C is at most
``f + g + 745 epsilon`` wherever float64 holds the entry at all. All bounds below are widened by η.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport import rounding
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import network_simplex
from pipelines.transport.true_cost import TrueCost

Gather = Callable[[torch.Tensor, Literal["sum", "min"]], torch.Tensor]

LARGEST_ERROR = 0.02
"""Error of an exponent up to which the first-order bounds hold."""

UNDERFLOW = 745.0
"""Exponents below minus this are 0 in float64."""

SHORTEST = 1e-13
"""Missing mass that is taken for the rounding of sums."""


@dataclass(frozen=True, eq=False)
class EntropicBounds:
    """What is proven.

    Attributes:
        primal: an upper bound of the optimum.
        dual: a lower bound.
        marginal_error: ``‖P 1 − a‖₁ + ‖Pᵀ 1 − b‖₁``, at most.
        f: (n,) source potentials of the plan.
        ambiguous: by how much the primal may differ for potentials that differ by rounding. It comes with forbidden
            pairs, around which one of several exact plans leads.
    """

    primal: float
    dual: float
    marginal_error: float
    f: torch.Tensor
    ambiguous: float = 0.0


@dataclass(frozen=True, eq=False)
class MarginalWeights:
    """Both marginals of these rows and all columns, float64, and how sums over all ranks' rows are made."""

    a: torch.Tensor
    b: torch.Tensor
    gather: Gather

    @property
    def roundings(self) -> float:
        """Relative error of a sum over all rows or columns, of the absolute values in it."""
        return rounding.gamma(self.total(torch.ones_like(self.a)) + len(self.b) + 64)

    @classmethod
    def of(cls, problem: TransportProblem, device: torch.device, gather: Gather | None = None) -> MarginalWeights:
        """Those of a problem; ``gather`` for a part of its rows."""
        a, b = (torch.as_tensor(w, device=device) for w in (problem.source_weights(), problem.target_weights()))
        return cls(a, b, gather or (lambda parts, _: parts))

    def total(self, over_rows: torch.Tensor) -> float:
        """The sum of (n,) numbers over all rows."""
        return float(self.gather(over_rows.sum()[None], "sum"))


def balanced(
    cost: TrueCost, weights: MarginalWeights, f: torch.Tensor, g: torch.Tensor, epsilon: float
) -> EntropicBounds:
    """Bounds after one more exact step of the source potentials, which meets the row marginals.

    The lower bound is the dual objective ``<a, f> + <b, g> − epsilon (Σ P − 1)`` (Peyré & Cuturi 2019, eq. 4.30). The
    upper one is the objective of a plan that has the marginals exactly: columns with too much mass are scaled down,
    and what is missing then is added as a product u dᵀ / Σ d (Altschuler, Weed & Rigollet 2017, algorithm 2). Its
    entropy is bounded by that of the two parts (log-sum inequality), which their marginals give without another look.

    Args:
        cost: of these rows.
        weights: of these rows and all columns.
        f: (n,) to start from.
        g: (m,).
        epsilon: > 0.

    Raises:
        NotConvergedError: exponents that float64 does not hold.
    """
    a, b = weights.a, weights.b
    rows, columns, eta, f = _masses(cost, weights, f, g, epsilon, meet_rows=True)
    error = weights.total((rows - a).abs()) + float((columns - b).abs().sum()) + 2.02 * eta
    sizes = weights.total((a * f).abs()) + float((b * g).abs().sum())
    sums = weights.roundings * sizes
    mass = float(columns.sum())
    dual = weights.total(a * f) + float(b @ g) - epsilon * (mass - float(b.sum()))
    dual = rounding.at_least(dual, (epsilon * 1.01 * eta, sums, weights.roundings * epsilon))
    scaling = (b / torch.where(columns > 0, columns, 1.0)).clamp_max(1)
    scaled_g = torch.where(columns > 0, g + epsilon * scaling.log(), g)
    met = columns * scaling
    short = (b - met).clamp_min(0)
    missing = float(short.sum())
    largest = _largest(weights, f) + float(scaled_g.abs().max())
    # Of masses that are each off by their share of η, seen through potentials and logarithms.
    widened = (sums, 2.02 * eta * (largest + 100 * epsilon))
    if missing <= SHORTEST:
        objective = weights.total(rows * f) + float(met @ scaled_g)
        return EntropicBounds(max(rounding.at_most(objective, widened), dual), dual, error, f)
    kept, across = _kept(cost, weights, f, scaled_g, short, epsilon)
    lost = (a - kept).clamp_min(0)
    objective = weights.total(kept * f) + float(met @ scaled_g)
    product = weights.total(lost * across) / missing
    if not math.isfinite(product):
        primal, ambiguous = _around_forbidden(cost, weights, kept, met, objective, epsilon)
        return EntropicBounds(max(rounding.at_most(primal, widened), dual), dual, error, f, ambiguous)
    # Of the kept part, of the product, and of their fractions of the mass.
    entropy = weights.total(_relative(lost, a)) + float(_relative(short, b).sum())
    entropy -= 2 * missing * math.log(missing) + ((1 - missing) * math.log1p(-missing) if missing < 1 else 0.0)
    dearest = -float(weights.gather(-across.abs().amax()[None], "min")) / missing
    primal = rounding.at_most(objective + product + epsilon * entropy, (*widened, 2.02 * eta * dearest))
    return EntropicBounds(max(primal, dual), dual, error, f)


def unbalanced(
    cost: TrueCost, weights: MarginalWeights, f: torch.Tensor, g: torch.Tensor, epsilon: float, penalty: float
) -> EntropicBounds:
    """The same for ``min <P, C> + epsilon KL(P | a bᵀ) + rho KL(P 1 | a) + rho KL(Pᵀ 1 | b)``.

    Every plan is feasible, so the upper bound is its objective; the lower one is the dual's (Chizat et al. 2018,
    "Scaling algorithms for unbalanced optimal transport problems", theorem 3.2). The error says how far the plan's
    marginals are from a and b, which is what the penalty permits.
    """
    rows, columns, eta, f = _masses(cost, weights, f, g, epsilon, meet_rows=False)
    primal, dual, error = objectives(weights, rows, columns, f, g, epsilon, penalty)
    sizes = weights.total((weights.a * f).abs()) + float((weights.b * g).abs().sum())
    largest = _largest(weights, f) + float(g.abs().max())
    sums = weights.roundings * (sizes + abs(primal) + abs(dual))
    logs = [(_safe(mass, weight).log().abs().max()) for mass, weight in ((rows, weights.a), (columns, weights.b))]
    swing = largest + epsilon + penalty * (2 + -float(weights.gather(-logs[0][None], "min")) + float(logs[1]))
    return EntropicBounds(
        rounding.at_most(primal, (sums, 2.02 * eta * swing)),
        rounding.at_least(dual, (sums, 1.01 * eta * epsilon)),
        error + 2.02 * eta,
        f,
    )


def marginal_error(
    cost: TrueCost, weights: MarginalWeights, f: torch.Tensor, g: torch.Tensor, epsilon: float
) -> tuple[float, float]:
    """``‖P 1 − a‖₁ + ‖Pᵀ 1 − b‖₁`` of the plan at given potentials, and how far that may be off."""
    rows, columns, eta, _ = _masses(cost, weights, f, g, epsilon, meet_rows=False)
    return weights.total((rows - weights.a).abs()) + float((columns - weights.b).abs().sum()), 2.02 * eta


def objectives(
    weights: MarginalWeights,
    rows: torch.Tensor,
    columns: torch.Tensor,
    f: torch.Tensor,
    g: torch.Tensor,
    epsilon: float,
    penalty: float,
) -> tuple[float, float, float]:
    """Primal and dual objective of an unbalanced plan and its marginal error, by the masses of its rows and columns."""
    a, b = weights.a, weights.b
    mass, product = float(columns.sum()), weights.total(a) * float(b.sum())
    objective = weights.total(rows * f) + float(columns @ g) - epsilon * (mass - product)
    objective += penalty * weights.total(_relative(rows, a) - rows + a)
    objective += penalty * float((_relative(columns, b) - columns + b).sum())
    dual = -epsilon * (mass - product)
    dual -= penalty * weights.total(a * torch.expm1(-f / penalty))
    dual -= penalty * float(b @ torch.expm1(-g / penalty))
    error = weights.total((rows - a).abs()) + float((columns - b).abs().sum())
    return objective, dual, error


def _masses(
    cost: TrueCost, weights: MarginalWeights, f: torch.Tensor, g: torch.Tensor, epsilon: float, *, meet_rows: bool
) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """Masses of rows and columns, η, and the source potentials: those that meet the row marginals, if asked for."""
    new_f = f.clone()
    rows = torch.empty_like(f)
    columns = torch.zeros_like(g)
    slack, largest = torch.empty_like(f), 0.0
    for start, block in cost.blocks():
        inside = slice(start, start + len(block))
        plan = _exponents(block, f[inside], g, epsilon)
        if meet_rows:
            top = plan.amax(1, keepdim=True)
            plan = plan.sub_(top).exp_().mul_(weights.b)
            sums = plan.sum(1, keepdim=True)
            new_f[inside] = f[inside] - epsilon * (top + sums.log())[:, 0]
            plan *= weights.a[inside, None] / sums
        else:
            plan = plan.exp_().mul_(weights.b).mul_(weights.a[inside, None])
        rows[inside] = plan.sum(1)
        columns += plan.sum(0)
        of_costs, most = cost.slack(plan, block, start)
        slack[inside], largest = of_costs, max(largest, most)
    columns = weights.gather(columns, "sum")
    # Of all rows, so that no rank of several goes on alone.
    largest = _largest(weights, torch.tensor([largest], dtype=torch.float64, device=f.device))
    least = _largest(weights, new_f) + float(g.abs().max())
    each = 4 * rounding.U64 * (2 * least / epsilon + UNDERFLOW)
    if not (largest / epsilon + each <= LARGEST_ERROR and bool(torch.isfinite(columns).all())):
        raise NotConvergedError(
            f"float64 does not hold the entropic plan at epsilon {epsilon:g}: its exponents are off by up to "
            f"{largest / epsilon + each:.1g}",
            hint="raise epsilon, or give 0 for the exact problem",
        )
    eta = weights.total(slack) / epsilon + each * float(columns.sum())
    return rows, columns, eta, new_f


def _kept(
    cost: TrueCost,
    weights: MarginalWeights,
    f: torch.Tensor,
    g: torch.Tensor,
    short: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masses of the rows under scaled potentials, and for each row ``Σ_j C_ij short_j``; (n,) each."""
    kept, across = torch.empty_like(f), torch.empty_like(f)
    for start, block in cost.blocks():
        inside = slice(start, start + len(block))
        plan = _exponents(block, f[inside], g, epsilon).exp_().mul_(weights.b)
        kept[inside] = plan.sum(1) * weights.a[inside]
        across[inside] = (
            torch.where(short > 0, block * short, 0.0).sum(1) if bool(block.isinf().any()) else block @ short
        )
    return kept, across


def _around_forbidden(
    cost: TrueCost, weights: MarginalWeights, kept: torch.Tensor, met: torch.Tensor, objective: float, epsilon: float
) -> tuple[float, float]:
    """An upper bound where the product would use forbidden pairs: the rest is an exact plan that does not.

    A fraction t of the kept part is given up until the rest has such a plan: for t = 1 it is that of the whole problem.

    Returns:
        The bound, and how far those of other exact plans may be from it.
    """
    matrix = torch.cat([block for _, block in cost.blocks()]).cpu().numpy()
    a, b = weights.a.cpu().numpy(), weights.b.cpu().numpy()
    mass = float(met.sum())
    for given_up in (1e-5, 1e-4, 1e-2, 0.1, 0.5, 1.0):
        left = (
            np.maximum(a - (1 - given_up) * kept.cpu().numpy(), 0),
            np.maximum(b - (1 - given_up) * met.cpu().numpy(), 0),
        )
        rest = float(left[1].sum())
        try:
            plan = network_simplex.solve(
                TransportProblem.from_cost(matrix, a=left[0] / left[0].sum(), b=left[1] / rest)
            )
        except ProblemError:
            continue
        rows, columns, moved = plan.entries()
        moved = moved * rest
        entropy = float((moved * np.log(moved / (a[rows] * b[columns]))).sum()) - rest * math.log(rest)
        entropy -= (1 - given_up) * mass * math.log(mass) if given_up < 1 else 0.0
        spread = float(np.ptp(matrix[np.isfinite(matrix)])) - epsilon * math.log(float((moved / rest).min()))
        return (1 - given_up) * objective + float(moved @ matrix[rows, columns]) + epsilon * entropy, rest * spread
    return math.inf, math.inf


def _exponents(block: torch.Tensor, f: torch.Tensor, g: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``(f_i + g_j − C_ij) / epsilon``, in memory of its own."""
    return torch.sub(g, block).add_(f[:, None]).div_(epsilon)


def _largest(weights: MarginalWeights, f: torch.Tensor) -> float:
    """``max |f|`` over the numbers of all ranks."""
    return -float(weights.gather(-f.abs().amax()[None], "min"))


def _safe(mass: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``mass / reference``, 1 where either is 0."""
    return torch.where((mass > 0) & (reference > 0), mass / torch.where(reference > 0, reference, 1.0), 1.0)


def _relative(mass: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``mass log(mass / reference)`` entry by entry, 0 where both are 0."""
    return torch.xlogy(mass, mass / torch.where(reference > 0, reference, 1.0))
