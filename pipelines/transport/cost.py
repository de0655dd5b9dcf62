"""Differentiable costs between points: of all pairs, and of matched pairs."""

from __future__ import annotations

import math

import torch

from pipelines.errors import ProblemError
from pipelines.spec import CostName
from pipelines.transport.precision import in_full_precision, wide


@in_full_precision
def pairwise_cost(x: torch.Tensor, y: torch.Tensor, cost: CostName, power: float = 2.0) -> torch.Tensor:
    """Compute the cost of every pair, differentiable with respect to both arguments.

    Args:
        x: points of one side, (n, d) float.
        y: points of the other side, (m, d) float.
        cost: ``squared-euclidean`` ‖x − y‖², ``euclidean`` ‖x − y‖ (Monge's original cost), ``power`` ‖x − y‖ᵖ,
            ``cosine`` 1 − cos(x, y). For a cost between features, pass features as points.
        power: exponent p of ``power``.

    Returns:
        Costs, (n, m), non-negative, in float32 or float64.
    """
    x, y = wide(x), wide(y)
    if cost == "cosine":
        x, y = (torch.nn.functional.normalize(points, dim=1) for points in (x, y))
        return (1 - x @ y.T).clamp_min(0)
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    squares = torch.addmm((x * x).sum(1)[:, None] + (y * y).sum(1)[None, :], x, y.T, alpha=-2).clamp_min_(0)
    return _of_squares(squares, cost, power)


@in_full_precision
def matched_cost(x: torch.Tensor, y: torch.Tensor, cost: CostName, power: float = 2.0) -> torch.Tensor:
    """Compute the costs of pairs (xᵢ, yᵢ), differentiable with respect to both; (n, d), (n, d) → (n,)."""
    x, y = wide(x), wide(y)
    if cost == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x, y, dim=1)
    squares = (x - y).square().sum(1)
    if cost != "squared-euclidean":
        # The root has no gradient at 0; pairs that coincide get the gradient 0.
        squares = squares.clamp_min(torch.finfo(x.dtype).tiny)
    return _of_squares(squares, cost, power)


def with_conditions(points: torch.Tensor, labels: torch.Tensor, classes: int, weight: float) -> torch.Tensor:
    """Points whose squared Euclidean cost counts ``weight`` for each pair of different labels.

    The condition-aware cost ``‖x − y‖² + weight · 1[label(x) ≠ label(y)]`` of Cheng & Schwing (2025), "The curse of
    conditions" (arXiv 2503.10636), eq. 8: without it, plans of minibatches move mass between classes, and a
    class-conditional flow trained on them meets sources at inference that training never paired with that class.
    Labels enter as scaled one-hot coordinates, so that every solver takes the cost, streaming and exact ones included.

    Args:
        points: points, (n, ...).
        labels: labels, (n,) int in [0, classes); those of sources are the requested classes of their samples.
        classes: number of classes, the same for sources and targets.
        weight: extra cost, ≥ 0, in units of the cost.

    Returns:
        Points with labels, (n, d + classes) float32.

    Raises:
        ProblemError: the labels do not fit the points or classes, or the weight is negative.
    """
    if labels.shape != points.shape[:1] or bool(((labels < 0) | (labels >= classes)).any()):
        raise ProblemError(
            f"labels: {tuple(labels.shape)} for {len(points)} points",
            hint=f"give each point one from 0 to {classes - 1}",
        )
    if not math.isfinite(weight) or weight < 0:
        raise ProblemError(f"weight: {weight} received", hint="give a number ≥ 0")
    return with_known_conditions(points, labels, classes, weight)


def with_known_conditions(points: torch.Tensor, labels: torch.Tensor, classes: int, weight: float) -> torch.Tensor:
    """:func:`with_conditions` without validation of the labels, which would synchronise a GPU."""
    points = points.float().reshape(len(points), -1)
    # Two different one-hot vectors of length s are 2 s² apart.
    codes = torch.nn.functional.one_hot(labels.long(), classes).to(points) * math.sqrt(weight / 2)
    return torch.cat([points, codes], 1)


def _of_squares(squares: torch.Tensor, cost: CostName, power: float) -> torch.Tensor:
    if cost == "squared-euclidean":
        return squares
    return squares.sqrt() if cost == "euclidean" else squares.pow(power / 2)
