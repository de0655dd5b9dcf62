"""Costs between points: whole matrices, rows of them, matched pairs."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch

from pipelines.errors import ProblemError
from pipelines.spec import CostName
from pipelines.transport.problem import TransportProblem


def cost_matrix(problem: TransportProblem) -> torch.Tensor:
    """The (n, m) float32 cost matrix of a problem, computed where its points are.

    Points are centred first: a common offset cancels in every cost below but the cosine, and left in place it costs
    float32 most of its digits (the squared norms dwarf their difference).
    """
    if problem.matrix is not None:
        return torch.as_tensor(problem.matrix)
    return pairwise_cost(torch.as_tensor(problem.x), torch.as_tensor(problem.y), problem.cost, problem.power)


def with_known_cost(problem: TransportProblem) -> TransportProblem:
    """The problem, its cost matrix computed where exact solvers know no screen for the cost."""
    if problem.cost == "power" and problem.matrix is None and problem.epsilon == 0:
        return problem.with_matrix(cost_matrix(problem))
    return problem


def pairwise_cost(x: torch.Tensor, y: torch.Tensor, cost: CostName, power: float = 2.0) -> torch.Tensor:
    """Cost of every pair, differentiable in both arguments.

    Args:
        x: (n, d) float tensor.
        y: (m, d) float tensor.
        cost: ``squared-euclidean`` ‖x − y‖², ``euclidean`` ‖x − y‖ (Monge's own), ``power`` ‖x − y‖ᵖ,
            ``cosine`` 1 − cos(x, y). For a cost between features, give features as points.
        power: the exponent p of ``power``.

    Returns:
        (n, m) tensor, non-negative.
    """
    if cost == "cosine":
        x, y = (torch.nn.functional.normalize(points, dim=1) for points in (x, y))
        return (1 - x @ y.T).clamp_min(0)
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    squares = torch.addmm((x * x).sum(1)[:, None] + (y * y).sum(1)[None, :], x, y.T, alpha=-2).clamp_min_(0)
    return _of_squares(squares, cost, power)


def matched_cost(x: torch.Tensor, y: torch.Tensor, cost: CostName, power: float = 2.0) -> torch.Tensor:
    """Cost of pairs (xᵢ, yᵢ), differentiable in both arguments; (n, d), (n, d) → (n,)."""
    if cost == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x, y, dim=1)
    squares = (x - y).square().sum(1)
    if cost != "squared-euclidean":
        # A root has no gradient at 0; a pair that already coincides should pull nowhere.
        squares = squares.clamp_min(torch.finfo(x.dtype).tiny)
    return _of_squares(squares, cost, power)


def with_conditions(points: torch.Tensor, labels: torch.Tensor, classes: int, weight: float) -> torch.Tensor:
    """Points whose squared Euclidean cost counts ``weight`` for each pair of different labels.

    The condition-aware cost ``‖x − y‖² + weight · 1[label(x) ≠ label(y)]`` of Cheng & Schwing (2025), "The curse of
    conditions" (arXiv 2503.10636), eq. 8: without it, plans of minibatches move mass between classes, and a
    class-conditional flow trained on them meets sources at inference that training never paired with that class.
    Labels enter as scaled one-hot coordinates, so that every solver takes the cost, streaming and exact ones included.

    Args:
        points: (n, ...); sources carry the labels that their samples are to have.
        labels: (n,) int in [0, classes).
        classes: their number, the same for sources and targets.
        weight: ≥ 0, in units of the cost.

    Returns:
        (n, d + classes) float32.

    Raises:
        ProblemError: labels that do not fit, or a negative weight.
    """
    points = points.float().reshape(len(points), -1)
    if labels.shape != points.shape[:1] or bool(((labels < 0) | (labels >= classes)).any()):
        raise ProblemError(
            f"labels: {tuple(labels.shape)} for {len(points)} points",
            cure=f"give each point one from 0 to {classes - 1}",
        )
    if not math.isfinite(weight) or weight < 0:
        raise ProblemError(f"weight: {weight} received", cure="give a number ≥ 0")
    # Two different one-hot vectors of length s are 2 s² apart.
    codes = torch.nn.functional.one_hot(labels.long(), classes).to(points) * math.sqrt(weight / 2)
    return torch.cat([points, codes], 1)


@runtime_checkable
class CostRows(Protocol):
    """A cost matrix of which some rows are looked at at a time."""

    shape: tuple[int, int]
    device: torch.device

    def costs(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start … stop − 1``, (stop − start, m) float32; not to be written to."""
        ...

    def exponents(
        self, start: int, stop: int, left: torch.Tensor, right: torch.Tensor, scale: float, out: torch.Tensor
    ) -> torch.Tensor:
        """``left_i + right_j − scale · C_ij`` for these rows, into ``out``.

        Args:
            start, stop: the rows.
            left: (stop − start,) float32.
            right: (m,) float32.
            scale: factor of the cost.
            out: (stop − start, m) float32.
        """
        ...


class MatrixRows:
    """Rows of a matrix that is there."""

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
        return torch.add(right, self.costs(start, stop), alpha=-scale, out=out).add_(left[:, None])


class PointRows:
    """Rows computed from points when they are looked at; no more memory than the points.

    Args:
        x: (n, d) float32.
        y: (m, d) float32.
        cost: its name.
        power: the exponent of cost ``power``.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor, cost: CostName, power: float = 2.0) -> None:
        self.shape = (len(x), len(y))
        self.device = x.device
        self._cost, self._power = cost, power
        if cost == "cosine":
            # Half the squared distance on the sphere.
            x, y = (torch.nn.functional.normalize(points, dim=1) * math.sqrt(0.5) for points in (x, y))
        else:
            centre = y.mean(0)
            x, y = x - centre, y - centre
        # With the norms as two more coordinates, one matrix product makes the squared distances.
        self._x = torch.cat([-2 * x, torch.ones_like(x[:, :1]), (x * x).sum(1, keepdim=True)], 1)
        self._y = torch.cat([y, (y * y).sum(1, keepdim=True), torch.ones_like(y[:, :1])], 1).T.contiguous()
        self._scaled = self._y.clone()

    def costs(self, start: int, stop: int) -> torch.Tensor:
        """See :class:`CostRows`."""
        squares = (self._x[start:stop] @ self._y).clamp_min_(0)
        return squares if self._cost == "cosine" else _of_squares(squares, self._cost, self._power)

    def exponents(
        self, start: int, stop: int, left: torch.Tensor, right: torch.Tensor, scale: float, out: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`CostRows`."""
        if self._cost in ("euclidean", "power"):
            return torch.add(right, self.costs(start, stop), alpha=-scale, out=out).add_(left[:, None])
        # Both potentials ride in the coordinates of the norms: the product is the exponent.
        rows = self._x[start:stop] * -scale
        rows[:, -2] = 1
        rows[:, -1] += left
        torch.add(right, self._y[-2], alpha=-scale, out=self._scaled[-2])
        return torch.mm(rows, self._scaled, out=out)


def cost_rows(problem: TransportProblem) -> CostRows:
    """The rows of a problem's cost matrix, computed where its points are and never all at once."""
    if problem.matrix is not None:
        return MatrixRows(torch.as_tensor(problem.matrix))
    return PointRows(torch.as_tensor(problem.x), torch.as_tensor(problem.y), problem.cost, problem.power)


def _of_squares(squares: torch.Tensor, cost: CostName, power: float) -> torch.Tensor:
    if cost == "squared-euclidean":
        return squares
    return squares.sqrt() if cost == "euclidean" else squares.pow(power / 2)
