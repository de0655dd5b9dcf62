"""Rows of a cost matrix for Sinkhorn's algorithm: in float32 for speed, or in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from pipelines.spec import CostName
from pipelines.transport.precision import in_full_precision
from pipelines.transport.problem import TransportProblem
from pipelines.transport.rounding import U32, U64
from pipelines.transport.true_cost import TrueCost, on_sphere


@runtime_checkable
class CostRows(Protocol):
    """A cost matrix that is read in blocks of rows."""

    shape: tuple[int, int]
    device: torch.device
    roundoff: float
    """Relative error of a cost."""

    def costs(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start … stop − 1``, (stop − start, m), read-only."""
        ...

    def exponents(
        self, start: int, stop: int, left: torch.Tensor, right: torch.Tensor, scale: float, out: torch.Tensor
    ) -> torch.Tensor:
        """Compute ``left_i + right_j − scale · C_ij`` for the rows ``start … stop − 1`` into ``out``.

        Args:
            start, stop: range of rows.
            left: term of each row, (stop − start,) float64.
            right: term of each column, (m,) float64.
            scale: factor of the cost.
            out: result, (stop − start, m) float32.
        """
        ...


class MatrixRows:
    """Rows of a float32 matrix in memory."""

    roundoff = U32

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        self.device = matrix.device

    def costs(self, start: int, stop: int) -> torch.Tensor:
        """See :class:`CostRows`."""
        return self.matrix[start:stop]

    def exponents(
        self, start: int, stop: int, left: torch.Tensor, right: torch.Tensor, scale: float, out: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`CostRows`."""
        return torch.add(right.float(), self.costs(start, stop), alpha=-scale, out=out).add_(left.float()[:, None])


class PointRows:
    """Rows computed from points on each read; stores only the points.

    Args:
        x: source points, (n, d) float32, near the origin.
        y: target points, (m, d) float32.
        cost: name of the cost.
        power: exponent of cost ``power``.
    """

    roundoff = U32

    def __init__(self, x: torch.Tensor, y: torch.Tensor, cost: CostName, power: float = 2.0) -> None:
        self.shape = (len(x), len(y))
        self.device = x.device
        self._cost, self._power = cost, power
        if cost == "cosine":
            # The cosine cost is half the squared distance on the sphere.
            x, y = x * math.sqrt(0.5), y * math.sqrt(0.5)
        # With the norms as two additional coordinates, one matrix product gives the squared distances.
        self._x = torch.cat([-2 * x, torch.ones_like(x[:, :1]), (x * x).sum(1, keepdim=True)], 1)
        self._y = torch.cat([y, (y * y).sum(1, keepdim=True), torch.ones_like(y[:, :1])], 1).T.contiguous()
        self._scaled = self._y.clone()

    @in_full_precision
    def costs(self, start: int, stop: int) -> torch.Tensor:
        """See :class:`CostRows`."""
        squares = (self._x[start:stop] @ self._y).clamp_min_(0)
        if self._cost == "euclidean":
            return squares.sqrt_()
        return squares.pow_(self._power / 2) if self._cost == "power" else squares

    @in_full_precision
    def exponents(
        self, start: int, stop: int, left: torch.Tensor, right: torch.Tensor, scale: float, out: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`CostRows`."""
        left, right = left.float(), right.float()
        if self._cost in ("euclidean", "power"):
            return torch.add(right, self.costs(start, stop), alpha=-scale, out=out).add_(left[:, None])
        # The coordinates of the norms also hold the potentials, so the product is the exponent.
        rows = self._x[start:stop] * -scale
        rows[:, -2] = 1
        rows[:, -1] += left
        torch.add(right, self._y[-2], alpha=-scale, out=self._scaled[-2])
        return torch.mm(rows, self._scaled, out=out)


class WideRows:
    """Rows of float64 costs, in the unit of a float32 problem; only the exponents are rounded to float32.

    Args:
        cost: float64 costs.
        unit: divisor of the costs.
        offset: number subtracted from the costs before the division.
    """

    roundoff = U64

    def __init__(self, cost: TrueCost, unit: float, offset: float) -> None:
        self.shape, self.device = cost.shape, cost.device
        self._cost, self._unit, self._offset = cost, unit, offset

    def costs(self, start: int, stop: int) -> torch.Tensor:
        """See :class:`CostRows`."""
        return (self._cost.block(start, stop) - self._offset) / self._unit

    def exponents(
        self, start: int, stop: int, left: torch.Tensor, right: torch.Tensor, scale: float, out: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`CostRows`."""
        return out.copy_(torch.sub(right, self.costs(start, stop), alpha=scale).add_(left[:, None]))


@dataclass(frozen=True, eq=False)
class Working:
    """A problem in float32, with its own origin and unit: ``cost = unit · working cost + offset``.

    Plans do not depend on origin and unit. Without them, points far from the origin would lose the digits in which they
    differ, and very small or very large costs would be outside float32's range.
    """

    x: torch.Tensor | None
    y: torch.Tensor | None
    matrix: torch.Tensor | None
    cost: CostName
    power: float
    unit: float
    offset: float

    @classmethod
    def of(cls, problem: TransportProblem, extent: float | None = None) -> Working:
        """Convert a problem to float32.

        Args:
            problem: problem to solve.
            extent: extent of the points about the mean of the targets; computed from the points by default.
        """
        if problem.matrix is not None:
            matrix = torch.as_tensor(problem.matrix)
            finite = matrix[torch.isfinite(matrix)]
            # The mass of an unbalanced plan depends on an offset.
            offset = float(finite.min()) if problem.marginal_penalty is None else 0.0
            # If all costs are equal, the unit comes from epsilon.
            unit = 2.0 ** math.frexp(float((finite.double() - offset).abs().max()) or problem.epsilon or 1.0)[1]
            return cls(None, None, ((matrix.double() - offset) / unit).float(), "power", 1.0, unit, offset)
        x, y = (torch.as_tensor(side) for side in (problem.x, problem.y))
        if problem.cost == "cosine":
            (x, _), (y, _) = on_sphere(x.double()), on_sphere(y.double())
            return cls(x.float(), y.float(), None, problem.cost, problem.power, 1.0, 0.0)
        centre = y.double().mean(0)
        x, y = (side - centre.to(side.dtype) if side.dtype == torch.float64 else side for side in (x, y))
        if x.dtype == torch.float32:
            x, y = x - centre.float(), y - centre.float()
        extent = extent_of(x, y) if extent is None else extent
        if extent == 0 or bool((x == y[0]).all() and (y == y[0]).all()):
            # The computed mean of equal numbers may differ from them; without this, the extent would be that rounding.
            return cls(
                torch.zeros_like(x).float(),
                torch.zeros_like(y).float(),
                None,
                problem.cost,
                problem.power,
                problem.epsilon or 1.0,
                0.0,
            )
        size = 2.0 ** math.frexp(extent)[1]
        x, y = ((side / size).float() for side in (x, y))
        return cls(x, y, None, problem.cost, problem.power, size**problem.exponent, 0.0)

    def rows(self, kept: TrueCost | None) -> CostRows:
        """Return the cost rows, on the device of the points: from ``kept``, or computed block by block on each read."""
        if kept is not None:
            blocks = [((block - self.offset) / self.unit).float() for _, block in kept.blocks()]
            return MatrixRows(torch.cat(blocks) if len(blocks) > 1 else blocks[0])
        if self.matrix is not None:
            return MatrixRows(self.matrix)
        assert self.x is not None
        assert self.y is not None
        return PointRows(self.x, self.y, self.cost, self.power)

    def to_own(self, potentials: np.ndarray, *, source: bool) -> np.ndarray:
        """Convert potentials of the problem to the working unit."""
        return (potentials - self.offset * source) / self.unit

    def from_own(self, potentials: torch.Tensor, *, source: bool) -> torch.Tensor:
        """Convert potentials in the working unit to those of the problem; the offset is added to the sources."""
        return potentials * self.unit + self.offset * source


def extent_of(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the largest absolute coordinate of both sets."""
    return max(float(x.abs().max()), float(y.abs().max()))
