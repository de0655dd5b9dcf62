"""Screens for the exact solver: cheap approximations of the cost matrix with a proven error.

The solver decides by exact costs, which it computes for the few pairs that may matter. A screen must never exceed an
exact cost by more than a known error, up to constants per row and per column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.transport import native
from pipelines.transport.precision import products_are_full
from pipelines.transport.rounding import U32, gamma

ULP = 2 * U32
"""Float32's unit in the last place of 1: twice the relative error of one rounding."""

LEAST_PRODUCT = 2.0**-120
"""Upper bound on the underflow error of a product of scaled coordinates in float32."""

FEW_COORDINATES = 16
"""Dimension up to which differences of coordinates are as fast as a matrix product; they are also more precise."""


@dataclass(frozen=True, eq=False)
class Screened:
    """A problem in the solver's units: cost = ``unit · (entry + row constant + column constant)``.

    Attributes:
        screen: approximate costs, read row by row.
        points: source of the exact entries; None for a float32 cost matrix, which is exact.
        unit: cost of one solver unit.
        row, column: row and column constants, (n,) float64 in the solver's units.
        shift: difference between the cost of an assignment and its exact entries in ``points``.
    """

    screen: native.Screen
    points: native.PointCosts | native.Table | None
    unit: float
    row: np.ndarray
    column: np.ndarray
    shift: float = 0.0


def from_matrix(matrix: np.ndarray) -> Screened:
    """Use a cost matrix as screen; a float64 matrix is rounded down to float32 after subtracting each row's minimum."""
    n = len(matrix)
    none = np.zeros(n)
    if matrix.dtype == np.float32:
        return Screened(native.Screen("costs", matrix), None, 1.0, none, none)
    least = matrix.min(1)
    above = matrix - least[:, None]
    scale = 2.0 ** -math.frexp(float(above.max()))[1]
    # Rounded down by more than the error of subtraction, scaling and conversion.
    screen = (above * (scale * (1 - 2 * ULP))).astype(np.float32)
    row = least * scale
    table = native.Table(matrix, scale, row, none)
    return Screened(native.Screen("costs", screen), table, 1 / scale, row, none)


def from_products(x: np.ndarray, y: np.ndarray, *, bfloat16: bool) -> Screened:
    """Screen half squared distances by a matrix product of centred points.

    ``½‖x − y‖² = −⟨x − c, y − e⟩ + ½‖x − e‖² + ½‖y − c‖² − ½‖c − e‖²`` with c and e the means; the product alone is the
    screen. Its error has three parts: the rounding of the points, at most the Cauchy–Schwarz bound of the residuals;
    the float32 accumulation, at most ``γ_d`` of the norms; and the error of the float64 constants, at most ``γ_d`` of
    their sizes (:mod:`pipelines.transport.rounding`).
    """
    d = x.shape[1]
    (centre_x, largest_x), (centre_y, largest_y) = _summary(x), _summary(y)
    # A power of two near the size of the points keeps squares inside float32's range and changes no digit.
    scale = 2.0 ** -math.frexp(max(largest_x, largest_y))[1]
    left = native.prepare(x, centre_x, centre_y, scale, bfloat16=bfloat16)
    right = native.prepare(y, centre_y, centre_x, scale, bfloat16=bfloat16)
    norm, residual = right.norm.max(), right.residual.max()
    across = float(((centre_x - centre_y) * scale) @ ((centre_x - centre_y) * scale)) / 2
    error = left.residual * norm + (left.norm + left.residual) * residual
    error += gamma(d + 2, U32) * (left.norm + left.residual) * (norm + residual) + d * LEAST_PRODUCT
    # Float64 rounding of the constants, of the centred points, of the norms above and of this sum.
    error *= 1 + gamma(2 * d + 16)
    error += gamma(d + 12) * (left.constant + right.constant.max() + across + 2 * left.norm * norm)
    column = right.constant - across
    points = native.PointCosts(x, y, scale * scale / 2, row=left.constant, column=column)
    matrix = _product(left.stored, right.stored)
    screen = native.Screen("bfloat16-products" if bfloat16 else "products", matrix, error, strict=True)
    return Screened(screen, points, 2 / (scale * scale), left.constant, column)


def from_differences(x: np.ndarray, y: np.ndarray, *, root: bool) -> Screened:
    """Screen squared distances, or distances, by differences of coordinates: lower bounds with a relative error.

    Points are scaled as in :func:`from_products`, and the matrix is rounded down by the error of d + 4 roundings.
    """
    d = x.shape[1]
    if x.dtype == np.float64:
        # Only differences are converted to float32, so the scale depends on them and not on the distance to the origin.
        largest = float((np.maximum(x.max(0), y.max(0)) - np.minimum(x.min(0), y.min(0))).max())
    else:
        largest = max(float(np.abs(x).max()), float(np.abs(y).max()))
    # For denormal points, the factor is limited to the range of their type.
    scale = x.dtype.type(2.0 ** min(-math.frexp(largest)[1], np.finfo(x.dtype).maxexp - 2))
    # Differences that underflow float32 here are below 2^-149 of the largest coordinate.
    matrix = native.distances(x * scale, y * scale, 1 - (d + 5) * ULP, root=root)
    factor = float(scale) if root else float(scale) ** 2
    points = native.PointCosts(x, y, factor, root=root)
    none = np.zeros(len(x))
    return Screened(native.Screen("costs", matrix), points, 1 / factor, none, none)


def from_distances(x: np.ndarray, y: np.ndarray) -> Screened:
    """Screen Euclidean distances by a matrix product: the square root of a lower bound of the square."""
    squares = from_products(x, y, bfloat16=False)
    assert isinstance(squares.points, native.PointCosts)
    assert squares.screen.error is not None
    matrix = torch.from_numpy(squares.screen.matrix)
    row = torch.from_numpy((squares.row - squares.screen.error).astype(np.float32))
    # Three more roundings of numbers no larger than the constants, and one rounding of the root.
    slack = 4 * ULP * float(np.max(squares.row) + np.max(np.abs(squares.column)))
    column = torch.from_numpy((squares.column - slack).astype(np.float32))
    matrix.neg_().add_(row[:, None]).add_(column).mul_(2).clamp_min_(0).sqrt_().mul_(1 - 4 * ULP)
    factor = float(np.sqrt(2 * squares.points.scale))
    points = native.PointCosts(x, y, factor, root=True)
    none = np.zeros(len(x))
    return Screened(native.Screen("costs", squares.screen.matrix), points, 1 / factor, none, none)


def _summary(x: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean of the points and a size to scale them by; for float64 points, the size after centring."""
    if x.dtype == np.float32:
        return native.summarise(x)
    mean = x.mean(0)
    return mean, float(np.abs(x - mean).max())


def as_numpy(points: np.ndarray | torch.Tensor) -> np.ndarray:
    """Convert points to a contiguous array on the CPU."""
    return np.ascontiguousarray(points.cpu().numpy() if isinstance(points, torch.Tensor) else points)


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    matrix = np.empty((len(x), len(y)), x.dtype)
    if x.dtype == np.uint16:
        left, right, out = (torch.from_numpy(array).view(torch.bfloat16) for array in (x, y, matrix))
        torch.mm(left, right.T, out=out)
    elif products_are_full():
        torch.mm(torch.from_numpy(x), torch.from_numpy(y).T, out=torch.from_numpy(matrix))
    else:  # torch is configured to round the factors, which the error bound does not include
        np.matmul(x, y.T, out=matrix)
    return matrix
