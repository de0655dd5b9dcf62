"""The transport problem: two weighted sets of points, or a cost matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from pipelines.errors import ProblemError
from pipelines.spec import CostName

Array = np.ndarray | torch.Tensor

Numbers = np.ndarray | torch.Tensor | Sequence[Any]
"""Numbers that callers may pass; nested lists are allowed."""

MASS_TOLERANCE = 1e-4
"""Largest relative difference of the two total masses that counts as rounding; it is removed by normalisation."""


LARGEST_COST = 1e290
"""Largest entry of a cost matrix; sums of larger ones would overflow float64."""

SMALLEST_EXTENT, LARGEST_EXTENT, LARGEST_POWER = 1e-140, 1e140, 280.0
"""Range of the extents of point clouds, and the largest power of ten that their costs may reach."""

FLOAT32_POWER = 4.0
"""Exponent of a cost up to which costs between float32 points are always in float64's range."""


@dataclass(frozen=True, eq=False)
class TransportProblem:
    """Kantorovich's problem: ``min <P, C> + epsilon KL(P | a bᵀ)`` over plans P with marginals a and b.

    Kantorovich (1942); Peyré & Cuturi, *Computational Optimal Transport* (2019), eq. 2.11 and 4.2. With
    ``epsilon = 0``, uniform weights and n = m, an optimal plan is a permutation: Monge's problem (ibid., eq. 2.2).

    Construct it with :meth:`between` or :meth:`from_cost`, which validate all arguments.

    Attributes:
        x: source points, (n, d) array or tensor; None if ``matrix`` is given. float32 if it represents all numbers
            exactly, else float64.
        y: target points, (m, d), of the same type.
        matrix: cost matrix, (n, m) float32 or float64; None if points are given. +inf forbids a pair.
        a: source weights, (n,) float64 with sum 1; None if uniform.
        b: target weights, (m,).
        cost: name of the cost between points.
        epsilon: entropic regularisation, in the units of the cost; 0 for the exact problem.
        power: exponent p of cost ``power``.
        marginal_penalty: None if the plan has marginals a and b; else the factor rho of the unbalanced problem, which
            replaces the constraints by the penalty ``rho KL(P 1 | a) + rho KL(Pᵀ 1 | b)`` (Chizat et al. 2018). Its
            weights are not normalised, and their total masses may differ.
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
        x: Numbers,
        y: Numbers,
        *,
        a: Numbers | None = None,
        b: Numbers | None = None,
        cost: CostName = "squared-euclidean",
        epsilon: float = 0.0,
        power: float = 2.0,
        marginal_penalty: float | None = None,
    ) -> TransportProblem:
        """Create a problem between points; images are flattened.

        Args:
            x: source points, (n, ...).
            y: target points, (m, ...), with the same shape after the first axis.
            a: source weights, (n,), non-negative; uniform by default. Weights need not sum to 1: both sides are
                divided by their common total.
            b: target weights, (m,).
            cost: name of the cost.
            epsilon: entropic regularisation.
            power: exponent of cost ``power``.
            marginal_penalty: see the attribute; requires epsilon > 0.

        Raises:
            ProblemError: if the input is invalid; the message states the violated rule and the value received.
        """
        if cost not in get_args(CostName):
            choices = ", ".join(get_args(CostName))
            raise ProblemError(f"cost: {cost!r} is not a cost", hint=f"choose one of {choices}")
        _one_device(x, y)
        left, right = _alike(numbers("x", x), numbers("y", y))
        if left.shape[1] != right.shape[1]:
            raise ProblemError(
                f"x has points of dimension {left.shape[1]}, y of dimension {right.shape[1]}",
                hint="give both sets the same number of coordinates",
            )
        if not np.isfinite(power) or power <= 0:
            raise ProblemError(f"power: {power} received", hint="give a positive exponent")
        _check_range(left, right, cost, power)
        penalty = _penalty(marginal_penalty, epsilon)
        of_rows, of_columns = _weights(a, b, left.shape[0], right.shape[0], balanced=penalty is None)
        return cls(left, right, None, of_rows, of_columns, cost, _epsilon(epsilon), float(power), penalty)

    @classmethod
    def from_cost(
        cls,
        matrix: Numbers,
        *,
        a: Numbers | None = None,
        b: Numbers | None = None,
        epsilon: float = 0.0,
        marginal_penalty: float | None = None,
    ) -> TransportProblem:
        """Create a problem with a given cost matrix.

        Args:
            matrix: costs, (n, m); +inf forbids a pair.
            a: source weights, (n,); uniform by default.
            b: target weights, (m,).
            epsilon: entropic regularisation.
            marginal_penalty: see the attribute; requires epsilon > 0.

        Raises:
            ProblemError: if the input is invalid; the message states the violated rule and the value received.
        """
        costs = numbers("matrix", matrix, forbidden=True)
        penalty = _penalty(marginal_penalty, epsilon)
        of_rows, of_columns = _weights(a, b, costs.shape[0], costs.shape[1], balanced=penalty is None)
        return cls(None, None, costs, of_rows, of_columns, epsilon=_epsilon(epsilon), marginal_penalty=penalty)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of source points and number of target points, (n, m)."""
        if self.matrix is not None:
            return int(self.matrix.shape[0]), int(self.matrix.shape[1])
        assert self.x is not None
        assert self.y is not None
        return int(self.x.shape[0]), int(self.y.shape[0])

    @property
    def exponent(self) -> float:
        """Exponent of the distance in the cost, for costs other than ``cosine``."""
        return {"squared-euclidean": 2.0, "euclidean": 1.0}.get(self.cost, self.power)

    @property
    def uniform(self) -> bool:
        """Whether all source points have equal weight, and all target points have equal weight."""
        return self.a is None and self.b is None

    @property
    def is_assignment(self) -> bool:
        """Whether an optimal plan is a permutation: equally many points on both sides, with equal weights."""
        n, m = self.shape
        return self.uniform and n == m and self.epsilon == 0

    def source_weights(self) -> np.ndarray:
        """Return the source marginal a, (n,) float64, with sum 1 unless the problem is unbalanced."""
        return np.full(self.shape[0], 1 / self.shape[0]) if self.a is None else self.a

    def target_weights(self) -> np.ndarray:
        """Return the target marginal b, (m,) float64, with sum 1 unless the problem is unbalanced."""
        return np.full(self.shape[1], 1 / self.shape[1]) if self.b is None else self.b

    def with_weight(self) -> tuple[TransportProblem, np.ndarray, np.ndarray]:
        """Return the problem between the points of non-zero weight, and the indices of its sources and targets."""
        a, b = self.source_weights(), self.target_weights()
        sources, targets = np.flatnonzero(a), np.flatnonzero(b)
        if len(sources) == len(a) and len(targets) == len(b):
            return self, sources, targets
        parts: dict[str, Any] = {"a": a[sources], "b": b[targets]}
        if self.matrix is not None:
            parts["matrix"] = self.matrix[sources][:, targets]
        else:
            assert self.x is not None
            assert self.y is not None
            parts |= {"x": self.x[sources], "y": self.y[targets]}
        return replace(self, **parts), sources, targets

    def with_matrix(self, matrix: Array) -> TransportProblem:
        """Return the same problem with the given cost matrix."""
        return replace(self, matrix=matrix)


def numbers(name: str, value: Numbers, *, forbidden: bool = False) -> Array:
    """Convert numbers to a contiguous (n, d) array: float32 if it represents them exactly, float64 otherwise.

    Args:
        name: name of the field, for error messages.
        value: numbers of any type, (n, ...).
        forbidden: whether +inf is allowed.

    Raises:
        ProblemError: if values are not numbers or not finite, or if there are no rows or columns.
    """
    if not isinstance(value, torch.Tensor):
        try:
            value = np.asarray(value)
        except ValueError:
            raise ProblemError(f"{name}: rows of different lengths received") from None
        if value.dtype.kind not in "fiub":
            raise ProblemError(f"{name}: numbers expected, received dtype {value.dtype}")
    if not value.shape or 0 in value.shape:
        raise ProblemError(
            f"{name}: shape {tuple(value.shape)} holds no points",
            hint="give an array of shape (n, d), n and d ≥ 1",
        )
    value = _as_tensor(value).detach() if isinstance(value, torch.Tensor) else _as_array(value)
    value = value.reshape(len(value), -1)
    value = value.contiguous() if isinstance(value, torch.Tensor) else np.ascontiguousarray(value)
    flat = torch.as_tensor(value)
    if math.isfinite(float(flat.sum())) and (not forbidden or float(flat.abs().max()) <= LARGEST_COST):
        return value  # a non-finite number makes the sum non-finite; much faster than checking each number
    bad = ~torch.isfinite(flat)
    if forbidden:
        bad &= flat != math.inf
    if bool(bad.any()):
        kinds = "NaN or -infinite" if forbidden else "NaN or infinite"
        raise ProblemError(
            f"{name}: {int(bad.sum())} of {value.shape[0] * value.shape[1]} numbers are {kinds}",
            hint="look for a diverged generator or an unscaled image",
        )
    if forbidden and bool((flat.abs() > LARGEST_COST).logical_and(flat != math.inf).any()):
        raise ProblemError(f"{name}: costs of more than {LARGEST_COST:g} received", hint="scale them down")
    return value


def _as_array(value: np.ndarray) -> np.ndarray:
    if value.dtype.itemsize <= 2 or value.dtype == np.float32:
        return value.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):  # numbers outside float32's range are detected below
        wide = value.astype(np.float64, copy=False)
        narrow = wide.astype(np.float32)
    if value.dtype.kind in "iu" and bool((np.abs(wide) > 2.0**53).any()):
        raise ProblemError("integers over 2^53 received, which float64 does not hold", hint="subtract an offset first")
    return narrow if np.array_equal(narrow, wide, equal_nan=True) else wide


def _as_tensor(value: torch.Tensor) -> torch.Tensor:
    if value.dtype == torch.float32 or value.element_size() <= 2:
        return value.float()
    wide = value.double()
    if not value.is_floating_point() and bool((wide.abs() > 2.0**53).any()):
        raise ProblemError("integers over 2^53 received, which float64 does not hold", hint="subtract an offset first")
    narrow = wide.float()
    return narrow if bool(((narrow == wide) | wide.isnan()).all()) else wide


def _one_device(x: Numbers, y: Numbers) -> None:
    """Check that all points are on one device; arrays are on the CPU. Weights may be on any device."""
    one, other = (side.device if isinstance(side, torch.Tensor) else torch.device("cpu") for side in (x, y))
    if one != other:
        raise ProblemError(f"x is on {one}, y on {other}", hint="move both to one device: x.to(y.device)")


def _alike(x: Array, y: Array) -> tuple[Array, Array]:
    """Convert both arrays to the wider of their types."""
    if str(x.dtype).endswith("64") == str(y.dtype).endswith("64"):
        return x, y
    widened = (side.double() if isinstance(side, torch.Tensor) else side.astype(np.float64) for side in (x, y))
    x, y = widened
    return x, y


def _check_range(x: Array, y: Array, cost: CostName, power: float) -> None:
    """Check that the costs between the points are in float64's range.

    Raises:
        ProblemError: if they are not; the message states the extent of the points.
    """
    exponent = {"squared-euclidean": 2.0, "euclidean": 1.0}.get(cost, power)
    sides = [torch.as_tensor(side) for side in (x, y)]
    if cost == "cosine" or (sides[0].dtype == torch.float32 and exponent <= FLOAT32_POWER):
        return
    low, high = (torch.stack([getattr(side.double(), bound)(0).cpu() for side in sides]) for bound in ("amin", "amax"))
    extent = float((high.amax(0) - low.amin(0)).max())
    if extent == 0 or (
        SMALLEST_EXTENT < extent < LARGEST_EXTENT and abs(exponent * math.log10(extent)) < LARGEST_POWER
    ):
        return
    raise ProblemError(
        f"x and y: coordinates {extent:g} apart received, whose costs leave float64's range",
        hint="scale the points: plans do not depend on their unit",
    )


def _weights(
    a: Numbers | None, b: Numbers | None, n: int, m: int, *, balanced: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Convert both marginals to float64, None if uniform; with sum 1, unless their masses may differ."""
    checked = [_one_side(name, w, size) for name, w, size in (("a", a, n), ("b", b, m))]
    if not balanced:
        return checked[0], checked[1]
    totals = [1.0 if w is None else float(w.sum()) for w in checked]
    if a is not None and b is not None and abs(totals[0] - totals[1]) > MASS_TOLERANCE * max(totals):
        raise ProblemError(
            f"a has mass {totals[0]:g}, b has mass {totals[1]:g}: balanced transport moves all of it",
            hint="normalise both to the same sum",
        )
    sides: list[np.ndarray | None] = []
    for weights, total in zip(checked, totals, strict=True):
        if weights is None or np.all(weights == weights[0]):
            sides.append(None)
        else:
            sides.append(weights / total)
    return sides[0], sides[1]


def _one_side(name: str, weights: Numbers | None, size: int) -> np.ndarray | None:
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
        raise ProblemError(f"epsilon: {epsilon} received", hint="give 0 for the exact problem, or a positive number")
    return float(epsilon)


def _penalty(penalty: float | None, epsilon: float) -> float | None:
    if penalty is None:
        return None
    if not np.isfinite(penalty) or penalty <= 0:
        raise ProblemError(f"marginal_penalty: {penalty} received", hint="give a positive number, or None for balance")
    if not epsilon > 0:
        raise ProblemError(
            f"marginal_penalty: {penalty:g} received with epsilon {epsilon:g}",
            hint="give epsilon > 0: unbalanced plans are entropic here",
        )
    return float(penalty)
