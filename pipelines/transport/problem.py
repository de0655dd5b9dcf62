"""The transport problem: two weighted sets of points, or a cost given outright."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch

from pipelines.errors import ProblemError
from pipelines.spec import CostName

Array = np.ndarray | torch.Tensor

MASS_TOLERANCE = 1e-4
"""Relative difference between the two total masses that is taken for rounding and normalised away."""


@dataclass(frozen=True, eq=False)
class TransportProblem:
    """Kantorovich's problem: ``min <P, C> + epsilon KL(P | a bᵀ)`` over plans P with marginals a and b.

    Kantorovich (1942); Peyré & Cuturi, *Computational Optimal Transport* (2019), eq. 2.11 and 4.2. With
    ``epsilon = 0``, uniform weights and n = m, an optimal plan is a permutation: Monge's problem (ibid., eq. 2.2).

    Construct it with :meth:`between` or :meth:`from_cost`, which check everything.

    Attributes:
        x: source points, (n, d) float32 array or tensor; None when ``matrix`` is given.
        y: target points, (m, d).
        matrix: cost matrix, (n, m) float32; None when points are given.
        a: source weights, (n,) float64 summing to 1; None for uniform ones.
        b: target weights, (m,).
        cost: name of the cost between points.
        epsilon: entropic regularisation, in the units of the cost; 0 for the exact problem.
        power: the exponent p of cost ``power``.
        marginal_penalty: None where the plan has marginals a and b; else the factor rho of the unbalanced problem,
            which charges ``rho KL(P 1 | a) + rho KL(Pᵀ 1 | b)`` in place of them (Chizat et al. 2018). Its weights
            keep their masses, which need not be equal.
    """

    x: Array | None
    y: Array | None
    matrix: Array | None
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    cost: CostName = "squared-euclidean"
    epsilon: float = 0.0
    power: float = 2.0
    marginal_penalty: float | None = None

    @classmethod
    def between(
        cls,
        x: Array,
        y: Array,
        *,
        a: Array | None = None,
        b: Array | None = None,
        cost: CostName = "squared-euclidean",
        epsilon: float = 0.0,
        power: float = 2.0,
        marginal_penalty: float | None = None,
    ) -> TransportProblem:
        """A problem between points; images are flattened.

        Args:
            x: source points, (n, ...).
            y: target points, (m, ...), of the same shape past the first axis.
            a: source weights, (n,), non-negative; uniform by default. Weights need not sum to 1: both sides are
                divided by their common total.
            b: target weights, (m,).
            cost: name of the cost.
            epsilon: entropic regularisation.
            power: the exponent of cost ``power``.
            marginal_penalty: see the attribute; asks for epsilon > 0.

        Raises:
            ProblemError: with the rule that the input breaks and the value received.
        """
        if cost not in get_args(CostName):
            choices = ", ".join(get_args(CostName))
            raise ProblemError(f"cost: {cost!r} is not a cost", cure=f"choose one of {choices}")
        x, y = _points("x", x), _points("y", y)
        if x.shape[1] != y.shape[1]:
            raise ProblemError(
                f"x has points of dimension {x.shape[1]}, y of dimension {y.shape[1]}",
                cure="give both sets the same number of coordinates",
            )
        if not np.isfinite(power) or power <= 0:
            raise ProblemError(f"power: {power} received", cure="give a positive exponent")
        penalty = _penalty(marginal_penalty, epsilon)
        a, b = _weights(a, b, x.shape[0], y.shape[0], balanced=penalty is None)
        return cls(x, y, None, a, b, cost, _epsilon(epsilon), float(power), penalty)

    @classmethod
    def from_cost(
        cls,
        matrix: Array,
        *,
        a: Array | None = None,
        b: Array | None = None,
        epsilon: float = 0.0,
        marginal_penalty: float | None = None,
    ) -> TransportProblem:
        """A problem with its cost matrix given.

        Args:
            matrix: costs, (n, m), finite.
            a: source weights, (n,); uniform by default.
            b: target weights, (m,).
            epsilon: entropic regularisation.
            marginal_penalty: see the attribute; asks for epsilon > 0.

        Raises:
            ProblemError: with the rule that the input breaks and the value received.
        """
        matrix = _points("matrix", matrix)
        penalty = _penalty(marginal_penalty, epsilon)
        a, b = _weights(a, b, matrix.shape[0], matrix.shape[1], balanced=penalty is None)
        return cls(None, None, matrix, a, b, epsilon=_epsilon(epsilon), marginal_penalty=penalty)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m): the numbers of source and of target points."""
        if self.matrix is not None:
            return int(self.matrix.shape[0]), int(self.matrix.shape[1])
        assert self.x is not None
        assert self.y is not None
        return int(self.x.shape[0]), int(self.y.shape[0])

    @property
    def uniform(self) -> bool:
        """Whether all source points weigh the same, and all target points too."""
        return self.a is None and self.b is None

    @property
    def is_assignment(self) -> bool:
        """Whether an optimal plan is a permutation: as many points on each side, all of the same weight."""
        n, m = self.shape
        return self.uniform and n == m and self.epsilon == 0

    def source_weights(self) -> np.ndarray:
        """The source marginal a, (n,) float64, summing to 1 unless the problem is unbalanced."""
        return np.full(self.shape[0], 1 / self.shape[0]) if self.a is None else self.a

    def target_weights(self) -> np.ndarray:
        """The target marginal b, (m,) float64, summing to 1 unless the problem is unbalanced."""
        return np.full(self.shape[1], 1 / self.shape[1]) if self.b is None else self.b

    def with_matrix(self, matrix: Array) -> TransportProblem:
        """The same problem with its cost matrix computed."""
        return replace(self, matrix=matrix)


def _points(name: str, value: Array) -> Array:
    """(n, d) contiguous float32, finite, at least one row and one column."""
    if not isinstance(value, torch.Tensor):
        value = np.asarray(value)
        if value.dtype.kind not in "fiub":
            raise ProblemError(f"{name}: numbers expected, received dtype {value.dtype}")
    if not value.shape or 0 in value.shape:
        raise ProblemError(
            f"{name}: shape {tuple(value.shape)} holds no points",
            cure="give an array of shape (n, d), n and d ≥ 1",
        )
    if isinstance(value, torch.Tensor):
        value = value.detach().float().reshape(len(value), -1).contiguous()
        finite = bool(torch.isfinite(value).all())
    else:
        with np.errstate(over="ignore"):  # what is over float32's range is told below
            value = np.ascontiguousarray(value.reshape(len(value), -1), dtype=np.float32)
        finite = bool(np.isfinite(value).all())
    if not finite:
        bad = int((~torch.isfinite(torch.as_tensor(value))).sum())
        raise ProblemError(
            f"{name}: {bad} of {value.shape[0] * value.shape[1]} numbers are NaN, infinite or over float32's range",
            cure="look for a diverged generator or an unscaled image",
        )
    return value


def _weights(
    a: Array | None, b: Array | None, n: int, m: int, *, balanced: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Both marginals as float64, None where uniform; summing to 1, unless masses may differ."""
    checked = [_one_side(name, w, size) for name, w, size in (("a", a, n), ("b", b, m))]
    if not balanced:
        return checked[0], checked[1]
    totals = [1.0 if w is None else float(w.sum()) for w in checked]
    if a is not None and b is not None and abs(totals[0] - totals[1]) > MASS_TOLERANCE * max(totals):
        raise ProblemError(
            f"a has mass {totals[0]:g}, b has mass {totals[1]:g}: balanced transport moves all of it",
            cure="normalise both to the same sum",
        )
    sides: list[np.ndarray | None] = []
    for weights, total in zip(checked, totals, strict=True):
        if weights is None or np.all(weights == weights[0]):
            sides.append(None)
        else:
            sides.append(weights / total)
    return sides[0], sides[1]


def _one_side(name: str, weights: Array | None, size: int) -> np.ndarray | None:
    if weights is None:
        return None
    if isinstance(weights, torch.Tensor):
        weights = weights.detach().cpu().numpy()
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (size,):
        raise ProblemError(f"{name}: shape {array.shape} received, ({size},) expected: one weight for each point")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ProblemError(f"{name}: weights are finite and ≥ 0; the least received is {array.min()}")
    if array.sum() <= 0:
        raise ProblemError(f"{name}: the weights sum to {array.sum():g}: there is no mass to move")
    return array


def _epsilon(epsilon: float) -> float:
    if not np.isfinite(epsilon) or epsilon < 0:
        raise ProblemError(f"epsilon: {epsilon} received", cure="give 0 for the exact problem, or a positive number")
    return float(epsilon)


def _penalty(penalty: float | None, epsilon: float) -> float | None:
    if penalty is None:
        return None
    if not np.isfinite(penalty) or penalty <= 0:
        raise ProblemError(f"marginal_penalty: {penalty} received", cure="give a positive number, or None for balance")
    if not epsilon > 0:
        raise ProblemError(
            f"marginal_penalty: {penalty:g} received with epsilon {epsilon:g}",
            cure="give epsilon > 0: unbalanced plans are entropic here",
        )
    return float(penalty)
