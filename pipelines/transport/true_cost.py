"""Costs in float64, computed from a problem's original numbers, with proven error bounds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pipelines.transport import rounding
from pipelines.transport.problem import TransportProblem

FEW_COORDINATES = 16
"""Dimension up to which blocks are computed from differences of coordinates: as fast as a product, more precise."""

GATHERED = 2**22
"""Number of coordinates of single pairs that are processed at a time."""

BLOCK = 2**21
"""Number of costs in a block."""


class TrueCost:
    """The costs of a problem, read in blocks of rows or as single pairs, in memory O((n + m) d).

    Blocks are computed by a matrix product, with an error relative to the squared norms of the centred points; single
    pairs are computed from differences, with an error relative to the cost (:mod:`pipelines.transport.rounding`).

    Args:
        problem: problem with points in their own precision, or with a cost matrix, which is used unchanged.
        direct: whether to compute blocks from differences too, in any dimension. Slower; for points whose distances
            are much smaller than their spread.
        keep: whether to keep computed blocks, in 8 n m bytes.
    """

    def __init__(self, problem: TransportProblem, *, direct: bool = False, keep: bool = False) -> None:
        self.shape = problem.shape
        self._kept: dict[tuple[int, int], torch.Tensor] | None = {} if keep else None
        self._matrix = None if problem.matrix is None else torch.as_tensor(problem.matrix)
        if self._matrix is not None:
            self.device = self._matrix.device
            return
        x, y = (torch.as_tensor(side).double() for side in (problem.x, problem.y))
        self.device = x.device
        self._cost, self._power = problem.cost, problem.power
        self._d = x.shape[1]
        if self._cost == "cosine":
            (x, self._half_x), (y, self._half_y) = on_sphere(x), on_sphere(y)
        self._x, self._y = x, y
        self.direct = direct or self._d <= FEW_COORDINATES
        if self.direct:
            self._columns = y.T.contiguous()
            return
        centre = y.mean(0)
        self._centred_x, self._centred_y = x - centre, y - centre
        self._norm_x, self._norm_y = (side.square().sum(1) for side in (self._centred_x, self._centred_y))

    @property
    def height(self) -> int:
        """Number of rows in a block of about :data:`BLOCK` costs."""
        return max(1, BLOCK // self.shape[1])

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Compute rows ``start … stop − 1``, (stop − start, m) float64, read-only.

        Forbidden pairs have infinite cost.
        """
        if self._matrix is not None:
            return self._matrix[start:stop].double()
        if self._kept is None:
            return self._of_squares(self._squares(start, stop, 0.0), start)
        if (start, stop) not in self._kept:
            self._kept[start, stop] = self._of_squares(self._squares(start, stop, 0.0), start)
        return self._kept[start, stop]

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Iterate over all blocks, each with the index of its first row; see :meth:`block`."""
        for start in range(0, self.shape[0], self.height):
            yield start, self.block(start, min(start + self.height, self.shape[0]))

    def lower(self, start: int, stop: int) -> torch.Tensor:
        """Compute lower bounds of the costs of rows ``start … stop − 1``."""
        if self._matrix is not None:
            return self._matrix[start:stop].to(torch.float64, copy=True)
        if self.direct:
            squares = self._squares(start, stop, 0.0).mul_(1 - rounding.of_differences(self._d))
        else:
            squares = self._squares(start, stop, rounding.of_products(self._d))
        return self._lowered(self._of_squares(squares, start))

    def _upper(self, start: int, stop: int) -> torch.Tensor:
        """Compute upper bounds of powers of the distance; for squares near 0, the bound of the root may be loose."""
        if self.direct:
            squares = self._squares(start, stop, 0.0).mul_(1 + rounding.of_differences(self._d))
        else:
            squares = self._squares(start, stop, -rounding.of_products(self._d))
        power = 1.0 if self._cost == "euclidean" else self._power
        return self._of_squares(squares, start).mul_(1 + rounding.of_power(power))

    def slack(self, weights: torch.Tensor, block: torch.Tensor, start: int) -> tuple[torch.Tensor, float]:
        """Bound ``Σ_j w_ij |block_ij − C_ij|`` for each row of a block.

        Args:
            weights: weights, (rows, m), ≥ 0; pairs of weight 0 are ignored.
            block: result of :meth:`block`.
            start: index of its first row.

        Returns:
            The bounds, (rows,) float64, and the largest of the differences.
        """
        if self._matrix is not None:
            return torch.zeros(len(block), dtype=torch.float64, device=self.device), 0.0
        if self._cost in ("euclidean", "power"):
            stop = start + len(block)
            apart = torch.maximum(block - self.lower(start, stop), self._upper(start, stop) - block)
            return (weights * apart).sum(1), float(torch.where(weights > 0, apart, 0.0).max())
        half, cosine = (0.5, rounding.of_cosine(self._d)) if self._cost == "cosine" else (1.0, (0.0, 0.0, 0.0))
        relative = rounding.of_differences(self._d) if self.direct else rounding.gamma(2)
        found = (weights * block).sum(1) * (relative + cosine[0])
        largest = float(torch.where(weights > 0, block, 0.0).max()) * (relative + cosine[0])
        total = weights.sum(1)
        if self._cost == "cosine":
            found += total * (2 * cosine[1] + cosine[2])  # |u − v| is at most 2
            largest += 2 * cosine[1] + cosine[2]
        if not self.direct:
            each, norms = half * rounding.of_products(self._d), self._norm_x[start : start + len(block)]
            found += each * (total * norms + weights @ self._norm_y)
            largest += each * float(norms.max() + self._norm_y.max())
        return found, largest

    def pairs(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute lower and upper bounds of single costs from differences, (k,) float64 each."""
        i, j = (torch.as_tensor(places, device=self.device) for places in (rows, columns))
        if self._matrix is not None:
            found = self._matrix[i, j].double().cpu().numpy()
            return found, found
        size = max(1, GATHERED // self._d)
        parts = [self._pairs(i[k : k + size], j[k : k + size]) for k in range(0, len(i), size)]
        if not parts:
            return np.empty(0), np.empty(0)
        low, high = (torch.cat(side).cpu().numpy() for side in zip(*parts, strict=True))
        return low, high

    def _pairs(self, i: torch.Tensor, j: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        squares = (self._x[i] - self._y[j]).square_().sum(1)
        error = rounding.of_differences(self._d)
        if self._cost == "cosine":
            value = squares / 2
            relative, root, absolute = rounding.of_cosine(self._d)
            slack = value * (relative + error) + (2 * value).sqrt() * root + absolute
            # A zero vector has no direction; its cosine with any other vector is defined as 0.
            constant = self._half_x[i] + self._half_y[j]
            low = torch.where(squares > 0, value - slack, 0.0).clamp_min_(0)
            return low + constant * (1 - 4 * rounding.U64), value + slack + constant * (1 + 4 * rounding.U64)
        if self._cost == "squared-euclidean":
            return squares * (1 - error), squares * (1 + error)
        power = 1.0 if self._cost == "euclidean" else self._power
        value, relative = squares.pow(power / 2), rounding.of_power(power) + error * (1 + power)
        return value * (1 - relative), value * (1 + relative)

    def _squares(self, start: int, stop: int, shrink: float) -> torch.Tensor:
        """Compute squared distances; if by a product, less ``shrink`` times the squared norms."""
        if not self.direct:
            rows = (self._norm_x[start:stop] * (1 - shrink))[:, None]
            columns = self._norm_y * (1 - shrink)
            product = torch.addmm(columns, self._centred_x[start:stop], self._centred_y.T, alpha=-2)
            return product.add_(rows).clamp_min_(0)
        if self._d > FEW_COORDINATES:
            return torch.cdist(self._x[start:stop], self._y, compute_mode="donot_use_mm_for_euclid_dist").square_()
        squares = torch.zeros(stop - start, self.shape[1], dtype=torch.float64, device=self.device)
        for k in range(self._d):
            squares += (self._x[start:stop, k, None] - self._columns[k]).square_()
        return squares

    def _of_squares(self, squares: torch.Tensor, start: int) -> torch.Tensor:
        match self._cost:
            case "squared-euclidean":
                return squares
            case "euclidean":
                return squares.sqrt_()
            case "power":
                return squares.pow_(self._power / 2)
        return squares.div_(2).add_(self._half_x[start : start + len(squares), None]).add_(self._half_y)

    def _lowered(self, costs: torch.Tensor) -> torch.Tensor:
        """Compute lower bounds of costs from lower bounds of the squared distances."""
        if self._cost == "cosine":
            relative, root, absolute = rounding.of_cosine(self._d)
            # |u − v| is known if it comes from differences, and at most 2 otherwise.
            apart = costs.mul(2).sqrt_().mul_(root * (1 + rounding.gamma(4))) if self.direct else 2 * root
            return costs.mul_(1 - relative - rounding.gamma(4)).sub_(apart).sub_(absolute).clamp_min_(0)
        power = {"squared-euclidean": 0.0, "euclidean": 1.0}.get(self._cost, self._power)
        return costs.mul_(1 - rounding.of_power(power))


def on_sphere(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise points to unit length, (k, d) float64, and return ½ for each point at the origin, (k,) float64.

    ``1 − cos = ½ |u − v|² + ½ (1 − |u|²) + ½ (1 − |v|²)``, where a point at the origin has cosine 0 with all others
    and is not changed.
    """
    # Scaled by a power of two first, so that squares of the coordinates neither overflow nor underflow.
    _, exponent = torch.frexp(points.abs().amax(1, keepdim=True))
    points = torch.ldexp(points, -exponent)
    norm = points.norm(dim=1, keepdim=True)
    origin = norm == 0
    return points / torch.where(origin, 1.0, norm), torch.where(origin, 0.5, 0.0)[:, 0]


def cost_matrix(problem: TransportProblem, *, direct: bool = False) -> torch.Tensor:
    """Compute the (n, m) float64 cost matrix of a problem on the device of its points; see :class:`TrueCost`."""
    return torch.cat([block for _, block in TrueCost(problem, direct=direct).blocks()])
