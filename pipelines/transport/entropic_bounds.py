"""Bounds on the entropic optimum from a pair of potentials, computed in float64 from the returned plan.

The plan is ``P_ij = a_i b_j exp((f_i + g_j − C_ij) / epsilon)``. An error δ of an exponent changes its entry by a
factor within ``1 ± 1.01 |δ|`` for ``|δ| ≤ 0.02``. With the sum ``η = Σ P |δ|`` over all entries, the error of any sum
of masses is therefore at most 1.01 η. δ has two parts: the error of the cost (:class:`TrueCost`), divided by epsilon;
and the rounding of the exponent, at most ``4 u (|f| + |g| + |C|) / epsilon``, where C is at most
``f + g + 745 epsilon`` for every entry that float64 can represent. All bounds below are widened by η.
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
"""Largest error of an exponent for which the first-order bounds hold."""

UNDERFLOW = 745.0
"""The exponential of numbers below −745 is 0 in float64."""

SHORTEST = 1e-13
"""Missing mass below which it counts as rounding of sums."""


@dataclass(frozen=True, eq=False)
class EntropicBounds:
    """Proven bounds on the optimum of an entropic problem.

    Attributes:
        primal: upper bound of the optimum.
        dual: lower bound of the optimum.
        marginal_error: upper bound of ``‖P 1 − a‖₁ + ‖Pᵀ 1 − b‖₁``.
        f: source potentials of the plan, (n,).
        ambiguous: possible difference of the primal for potentials that differ by rounding; non-zero only with
            forbidden pairs, which one of several exact plans avoids.
    """

    primal: float
    dual: float
    marginal_error: float
    f: torch.Tensor
    ambiguous: float = 0.0


@dataclass(frozen=True, eq=False)
class MarginalWeights:
    """Float64 marginals of these rows and of all columns, and the function that sums over the rows of all ranks."""

    a: torch.Tensor
    b: torch.Tensor
    gather: Gather

    @property
    def roundings(self) -> float:
        """Error of a sum over all rows or columns, relative to the sum of absolute values."""
        return rounding.gamma(self.total(torch.ones_like(self.a)) + len(self.b) + 64)

    @classmethod
    def of(cls, problem: TransportProblem, device: torch.device, gather: Gather | None = None) -> MarginalWeights:
        """Create the weights of a problem; ``gather`` is required for a part of its rows."""
        a, b = (torch.as_tensor(w, device=device) for w in (problem.source_weights(), problem.target_weights()))
        return cls(a, b, gather or (lambda parts, _: parts))

    def total(self, over_rows: torch.Tensor) -> float:
        """Sum (n,) numbers over all rows."""
        return float(self.gather(over_rows.sum()[None], "sum"))


def balanced(
    cost: TrueCost, weights: MarginalWeights, f: torch.Tensor, g: torch.Tensor, epsilon: float
) -> EntropicBounds:
    """Compute bounds after one more exact step of the source potentials, which meets the row marginals.

    The lower bound is the dual objective ``<a, f> + <b, g> − epsilon (Σ P − 1)`` (Peyré & Cuturi 2019, eq. 4.30). The
    upper bound is the objective of a plan with exact marginals: columns with too much mass are scaled down, and the
    missing mass is added as a product u dᵀ / Σ d (Altschuler, Weed & Rigollet 2017, algorithm 2). The entropy of this
    plan is at most that of its two parts (log-sum inequality), which follows from their marginals without another pass.

    Args:
        cost: costs of these rows.
        weights: weights of these rows and of all columns.
        f: initial source potentials, (n,).
        g: target potentials, (m,).
        epsilon: entropic regularisation, > 0.

    Raises:
        NotConvergedError: if exponents are outside float64's range.
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
    # Effect of the mass errors, η in total, on sums with potentials and logarithms.
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
    # Entropy of the kept part, of the product, and of their fractions of the mass.
    entropy = weights.total(_relative(lost, a)) + float(_relative(short, b).sum())
    entropy -= 2 * missing * math.log(missing) + ((1 - missing) * math.log1p(-missing) if missing < 1 else 0.0)
    dearest = -float(weights.gather(-across.abs().amax()[None], "min")) / missing
    primal = rounding.at_most(objective + product + epsilon * entropy, (*widened, 2.02 * eta * dearest))
    return EntropicBounds(max(primal, dual), dual, error, f)


def unbalanced(
    cost: TrueCost, weights: MarginalWeights, f: torch.Tensor, g: torch.Tensor, epsilon: float, penalty: float
) -> EntropicBounds:
    """Compute bounds for ``min <P, C> + epsilon KL(P | a bᵀ) + rho KL(P 1 | a) + rho KL(Pᵀ 1 | b)``.

    Every plan is feasible, so the upper bound is the objective of the plan; the lower bound is the dual objective
    (Chizat et al. 2018, "Scaling algorithms for unbalanced optimal transport problems", theorem 3.2). The marginal
    error is the distance of the plan's marginals from a and b, which the penalty permits to be non-zero.
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
    """Compute ``‖P 1 − a‖₁ + ‖Pᵀ 1 − b‖₁`` of the plan with given potentials, and the error of this number."""
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
    """Compute the objectives and the marginal error of an unbalanced plan from the masses of its rows and columns."""
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
    """Compute the masses of rows and columns, η, and the source potentials, which optionally meet the row marginals."""
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
    # Maximum over all ranks, so that all ranks take the same branch.
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
    """Compute the masses of the rows under scaled potentials, and ``Σ_j C_ij short_j`` for each row; (n,) each."""
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
    """Compute an upper bound if the product would use forbidden pairs: an exact plan without them adds missing mass.

    A fraction t of the kept part is moved to the rest until such a plan exists; for t = 1, the rest is the whole
    problem.

    Returns:
        The bound, and the possible distance to the bounds from other exact plans.
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
    """Compute ``(f_i + g_j − C_ij) / epsilon`` in a new tensor."""
    return torch.sub(g, block).add_(f[:, None]).div_(epsilon)


def _largest(weights: MarginalWeights, f: torch.Tensor) -> float:
    """Compute ``max |f|`` over all ranks."""
    return -float(weights.gather(-f.abs().amax()[None], "min"))


def _safe(mass: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Compute ``mass / reference``, 1 where either is 0."""
    return torch.where((mass > 0) & (reference > 0), mass / torch.where(reference > 0, reference, 1.0), 1.0)


def _relative(mass: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Compute ``mass log(mass / reference)`` elementwise, 0 where both are 0."""
    return torch.xlogy(mass, mass / torch.where(reference > 0, reference, 1.0))
