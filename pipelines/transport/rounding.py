"""Bounds on rounding errors, which every certificate uses, with their derivation.

Model of arithmetic: ``fl(x ∘ y) = (x ∘ y)(1 + δ)``, ``|δ| ≤ u`` (Higham, *Accuracy and Stability of Numerical
Algorithms*, 2002, eq. 2.4), results below the normal range apart. A product of k such factors is ``1 + θ`` with
``|θ| ≤ γ_k = k u / (1 − k u)`` (ibid., lemma 3.1); a sum of k products has a relative error of at most ``γ_k`` of
the sum of their absolute values, in any order and with or without fused multiply-adds (ibid., section 3.1).

**Squared distance from differences.** Each ``(x_k − y_k)²`` has relative error ``γ_3`` and all terms are ≥ 0, so the
sum over d coordinates has relative error ``γ_(d+2)``: small however far the points lie from the origin.

**Squared distance from a product.** With ``X = x − c`` and ``Y = y − c`` rounded, ``|X|² + |Y|² − 2 ⟨X, Y⟩``:

- the norms have errors ``γ_d |X|²`` and ``γ_d |Y|²``; the product ``γ_d |X| |Y| ≤ γ_d (|X|² + |Y|²) / 2``, counted
  twice;
- the two additions round numbers of at most ``(|X| + |Y|)² ≤ 2 (|X|² + |Y|²)``: ``4 u (|X|² + |Y|²)``;
- centring changes X by at most ``u |X|``, hence the distance by ``u (|X| + |Y|)`` and its square by
  ``2 u (|X| + |Y|)² ≤ 4 u (|X|² + |Y|²)``, up to second order.

Together less than ``2 γ_(d+8) (|X|² + |Y|²)``, a part of the row plus a part of the column: :func:`of_products`.

**Cosine.** For unit vectors ``1 − ⟨x, y⟩ = ½ |x − y|²``. A vector divided by its computed norm is ``(1 + δ) û + e``
with ``|δ| ≤ γ_(d/2+3)`` (the same factor for all coordinates) and ``|e| ≤ 2 u``. Then ``½ |u − v|²`` equals
``(1 + δ)(1 + δ')(1 − ⟨û, v̂⟩) + ½ (δ − δ')²`` up to ``4 u |û − v̂| + 8 u²``: :func:`of_cosine`. The error of length
enters in second order only, so that the cost of nearly parallel vectors keeps its digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

U64 = 2.0**-53
"""Unit roundoff of float64."""

U32 = 2.0**-24
"""Unit roundoff of float32."""


def gamma(k: int | float, u: float = U64) -> float:
    """``γ_k``: bound on the relative error of k roundings; infinite where ``k u ≥ 1``."""
    return k * u / (1 - k * u) if k * u < 1 else math.inf


def of_differences(d: int) -> float:
    """Relative error of a squared distance from the differences of d coordinates."""
    return gamma(d + 3)


def of_products(d: int) -> float:
    """Error of a squared distance from a matrix product, per unit of ``|X|² + |Y|²`` as computed."""
    return 2 * gamma(d + 12)


def of_cosine(d: int) -> tuple[float, float, float]:
    """Error of ``½ |u − v|²`` as the cosine cost C: relative, per unit of ``√(2 C)``, and absolute."""
    length = gamma(d / 2 + 6)
    return 2 * length, 4 * U64, 2 * length**2 + 8 * U64**2


def of_power(power: float) -> float:
    """Relative error of ``s ** (power / 2)`` as computed, for s as given: libraries are within two units."""
    return gamma(8 + power)


def of_masses(a: np.ndarray, b: np.ndarray) -> float:
    """Bound on the remainder of a weight after successive subtractions of other weights."""
    return 4 * U64 * (len(a) + len(b)) * max(float(a.max()), float(b.max()))


def weighted_sum(weights: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """``Σ w v`` and a bound on its error: the sum is rounded once (:func:`math.fsum`), each product once."""
    products = weights * values
    return sum_of(products)


def sum_of(products: np.ndarray) -> tuple[float, float]:
    """The sum of numbers that have been rounded twice at most, and a bound on its error."""
    return math.fsum(products), 4 * U64 * float(np.abs(products).sum())


def at_most(value: float, errors: Sequence[float]) -> float:
    """A float64 that is certainly ≥ ``value + Σ errors``; the errors are ≥ 0."""
    return math.nextafter(math.fsum((value, *errors)), math.inf) if any(errors) else value


def at_least(value: float, errors: Sequence[float]) -> float:
    """A float64 that is certainly ≤ ``value − Σ errors``; the errors are ≥ 0."""
    return -at_most(-value, errors)
