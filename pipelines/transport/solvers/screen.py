"""What the exact solver reads in place of the costs: matrices near them, cheap to make, with a proven error.

The solver decides by exact costs, which it computes for the few pairs that may matter. All that it asks of a screen is
never to lie above an exact cost by more than a known error, up to constants of the row and of the column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.transport import native
from pipelines.transport.problem import TransportProblem

ULP = 2.0**-23
"""Float32's unit in the last place of 1: twice the relative error of one rounding."""

FEW_COORDINATES = 16
"""Dimension up to which differences of coordinates cost no more than a matrix product, and are the sharper screen."""


@dataclass(frozen=True, eq=False)
class Screened:
    """A problem in the solver's units: cost = ``unit · (entry + row constant + column constant)``.

    Attributes:
        screen: what is read in full.
        points: where exact entries come from; None for a cost matrix, which is exact itself.
        unit: cost of one unit.
        row, column: the constants, (n,) float64 in the solver's units.
    """

    screen: native.Screen
    points: native.Points | None
    unit: float
    row: np.ndarray
    column: np.ndarray


def from_matrix(problem: TransportProblem) -> Screened:
    """A cost matrix as its own screen."""
    assert problem.matrix is not None
    none = np.zeros(problem.shape[0])
    return Screened(native.Screen("costs", as_numpy(problem.matrix)), None, 1.0, none, none)


def from_products(x: np.ndarray, y: np.ndarray, *, bfloat16: bool) -> Screened:
    """Half squared distances by a matrix product of centred points.

    ``½‖x − y‖² = −⟨x − c, y − e⟩ + ½‖x − e‖² + ½‖y − c‖² − ½‖c − e‖²`` with c and e the means: the product alone is the
    screen. Rounding the points to bfloat16 turns it by at most the Cauchy–Schwarz bound of the residuals; its float32
    accumulation by ``d`` roundings (Higham, *Accuracy and Stability*, 2002, eq. 3.5).
    """
    d = x.shape[1]
    (centre_x, largest_x), (centre_y, largest_y) = native.summarise(x), native.summarise(y)
    # A power of two near the points' size keeps squares inside float32's range, and changes no digit.
    scale = 2.0 ** -math.frexp(max(largest_x, largest_y))[1]
    left = native.prepare(x, centre_x, centre_y, scale, bfloat16=bfloat16)
    right = native.prepare(y, centre_y, centre_x, scale, bfloat16=bfloat16)
    norm, residual = right.norm.max(), right.residual.max()
    error = left.residual * norm + (left.norm + left.residual) * residual
    error += (d + 2) * ULP / 2 * (left.norm + left.residual) * (norm + residual) + d * 2.0**-120
    across = float(((centre_x - centre_y) * scale) @ ((centre_x - centre_y) * scale)) / 2
    column = right.constant - across
    points = native.Points(x, y, scale * scale / 2, row=left.constant, column=column)
    matrix = _product(left.stored, right.stored)
    screen = native.Screen("bfloat16-products" if bfloat16 else "products", matrix, error, strict=True)
    return Screened(screen, points, 2 / (scale * scale), left.constant, column)


def from_differences(x: np.ndarray, y: np.ndarray, *, root: bool) -> Screened:
    """Squared distances, or distances, from differences of coordinates: lower bounds with a relative error.

    Points are scaled as above, and the matrix is rounded down by what d + 4 roundings can have added.
    """
    d = x.shape[1]
    largest = max(float(np.abs(x).max()), float(np.abs(y).max()))
    scale = np.float32(2.0 ** -math.frexp(largest)[1])
    # Differences that underflow float32 here are below 2^-149 of the largest coordinate.
    matrix = native.distances(x * scale, y * scale, 1 - (d + 4) * ULP, root=root)
    factor = float(scale) if root else float(scale) ** 2
    points = native.Points(x, y, factor, root=root)
    none = np.zeros(len(x))
    return Screened(native.Screen("costs", matrix), points, 1 / factor, none, none)


def from_distances(x: np.ndarray, y: np.ndarray) -> Screened:
    """Euclidean distances from a matrix product: the square root of a lower bound of the square."""
    squares = from_products(x, y, bfloat16=False)
    assert squares.points is not None
    assert squares.screen.error is not None
    matrix = torch.from_numpy(squares.screen.matrix)
    row = torch.from_numpy((squares.row - squares.screen.error).astype(np.float32))
    # Three more roundings of numbers no larger than the constants, and one of the root.
    slack = 4 * ULP * float(np.max(squares.row) + np.max(np.abs(squares.column)))
    column = torch.from_numpy((squares.column - slack).astype(np.float32))
    matrix.neg_().add_(row[:, None]).add_(column).mul_(2).clamp_min_(0).sqrt_().mul_(1 - 4 * ULP)
    factor = float(np.sqrt(2 * squares.points.scale))
    points = native.Points(x, y, factor, root=True)
    none = np.zeros(len(x))
    return Screened(native.Screen("costs", squares.screen.matrix), points, 1 / factor, none, none)


def on_sphere(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points divided by their norms, and ``½ (1 − ‖·‖²)`` of the result, 0 but for rounding and points at the origin.

    ``1 − ⟨x, y⟩ = ½‖x − y‖² + ½(1 − ‖x‖²) + ½(1 − ‖y‖²)``: the cosine cost is a squared Euclidean one.
    """
    norm = np.linalg.norm(points.astype(np.float64), axis=1, keepdims=True)
    units = (points / np.maximum(norm, 1e-12)).astype(np.float32)
    return units, (1 - np.square(units, dtype=np.float64).sum(1)) / 2


def as_numpy(points: np.ndarray | torch.Tensor) -> np.ndarray:
    """A contiguous float32 array, on the CPU."""
    array = points.cpu().numpy() if isinstance(points, torch.Tensor) else points
    return np.ascontiguousarray(array, np.float32)


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    matrix = np.empty((len(x), len(y)), x.dtype)
    if x.dtype == np.uint16:
        left, right, out = (torch.from_numpy(array).view(torch.bfloat16) for array in (x, y, matrix))
        torch.mm(left, right.T, out=out)
    elif torch.get_float32_matmul_precision() == "highest":
        torch.mm(torch.from_numpy(x), torch.from_numpy(y).T, out=torch.from_numpy(matrix))
    else:  # torch was told to round the factors, which the error does not allow for
        np.matmul(x, y.T, out=matrix)
    return matrix
