"""Bounds on the entropic optimum from a pair of potentials: what the certificate of an entropic plan is made of."""

from __future__ import annotations

import math

import torch

from pipelines.transport.solvers.sweep import Kernel, Sweep


def balanced(
    kernel: Kernel, f: torch.Tensor, g: torch.Tensor, last: Sweep, epsilon: float
) -> tuple[float, float, float]:
    """Upper bound, lower bound, and L1 error of both marginals.

    The lower bound is the dual objective ``<a, f> + <b, g> − epsilon (Σ P − 1)`` (Peyré & Cuturi 2019, eq. 4.30). The
    upper one is the objective of a plan that has the marginals exactly: columns with too much mass are scaled down,
    and what is missing then is added as a product δa δbᵀ / |δ| (Altschuler et al. 2017, algorithm 2). Its entropy is
    bounded by that of the two parts (log-sum inequality), which their marginals give without another look at entries.
    """
    a, b = kernel.a, kernel.b
    columns = b * last.columns
    error = kernel.total((a * last.rows - a).abs()) + float((columns - b).abs().sum())
    dual = kernel.total(a * f) + float(b @ g) - epsilon * (float(columns.sum()) - float(b.sum()))
    scaled_g = g - epsilon * last.columns.clamp_min(1).log()
    kept = kernel.sweep(f, scaled_g, epsilon, None)
    # Rows are met up to rounding; what float32 leaves above a row's weight is taken off with its potential.
    scaled_f = f - epsilon * kept.rows.clamp_min(1).log()
    rows = a * kept.rows.clamp_max(1)
    columns = b * torch.minimum(kept.columns, torch.ones_like(b))
    objective = kernel.total(rows * scaled_f) + float(columns @ scaled_g)
    missing_rows, missing_columns = a - rows, (b - columns).clamp_min(0)
    missing = kernel.total(missing_rows)
    short = float(missing_columns.sum())
    # Where no column is short, the rows are so by the rounding of their sums alone.
    if missing <= 1e-12 or short == 0:
        return max(objective, dual), dual, error
    missing_columns *= missing / short
    product = kernel.bilinear(missing_rows, missing_columns) / missing
    # Of the kept part, of the product, and of their shares of the mass.
    entropy = kernel.total(_relative(missing_rows, a)) + float(_relative(missing_columns, b).sum())
    entropy -= 2 * missing * math.log(missing) + (1 - missing) * math.log1p(-missing)
    return objective + product + epsilon * entropy, dual, error


def unbalanced(
    kernel: Kernel, f: torch.Tensor, g: torch.Tensor, last: Sweep, epsilon: float, penalty: float
) -> tuple[float, float, float]:
    """The same for ``min <P, C> + epsilon KL(P | a bᵀ) + rho KL(P 1 | a) + rho KL(Pᵀ 1 | b)``.

    Every plan is feasible, so the upper bound is its objective; the lower one is the dual's (Chizat et al. 2018,
    "Scaling algorithms for unbalanced optimal transport problems", theorem 3.2). The error says how far the plan's
    marginals are from a and b, which is what the penalty permits.
    """
    a, b = kernel.a, kernel.b
    rows, columns = a * last.rows, b * last.columns
    mass, product = float(columns.sum()), kernel.total(a) * float(b.sum())
    objective = kernel.total(rows * f) + float(columns @ g) - epsilon * (mass - product)
    objective += penalty * kernel.total(_relative(rows, a) - rows + a)
    objective += penalty * float((_relative(columns, b) - columns + b).sum())
    dual = -epsilon * (mass - product)
    dual -= penalty * kernel.total(a * torch.expm1(-f / penalty))
    dual -= penalty * float(b @ torch.expm1(-g / penalty))
    error = kernel.total((rows - a).abs()) + float((columns - b).abs().sum())
    return objective, dual, error


def _relative(mass: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``mass log(mass / reference)`` entry by entry, 0 where both are 0."""
    return torch.xlogy(mass, mass / torch.where(reference > 0, reference, 1.0))
