"""Costs between points, and their matrices."""

from __future__ import annotations

import torch

from pipelines.spec import CostName
from pipelines.transport.problem import TransportProblem


def cost_matrix(problem: TransportProblem) -> torch.Tensor:
    """The (n, m) float32 cost matrix of a problem, computed where its points are.

    Points are centred first: a common offset cancels in every cost below but the cosine, and left in place it costs
    float32 most of its digits (the squared norms dwarf their difference).
    """
    if problem.matrix is not None:
        return torch.as_tensor(problem.matrix)
    return pairwise_cost(torch.as_tensor(problem.x), torch.as_tensor(problem.y), problem.cost)


def pairwise_cost(x: torch.Tensor, y: torch.Tensor, cost: CostName) -> torch.Tensor:
    """Cost of every pair, differentiable in both arguments.

    Args:
        x: (n, d) float tensor.
        y: (m, d) float tensor.
        cost: ``squared-euclidean`` ‖x − y‖², ``euclidean`` ‖x − y‖ (Monge's own), ``cosine`` 1 − cos(x, y).

    Returns:
        (n, m) tensor, non-negative.
    """
    if cost == "cosine":
        x, y = (torch.nn.functional.normalize(points, dim=1) for points in (x, y))
        return (1 - x @ y.T).clamp_min(0)
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    squares = torch.addmm((x * x).sum(1)[:, None] + (y * y).sum(1)[None, :], x, y.T, alpha=-2).clamp_min_(0)
    return squares if cost == "squared-euclidean" else squares.sqrt()


def matched_cost(x: torch.Tensor, y: torch.Tensor, cost: CostName) -> torch.Tensor:
    """Cost of pairs (xᵢ, yᵢ), differentiable in both arguments; (n, d), (n, d) → (n,)."""
    if cost == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x, y, dim=1)
    squares = (x - y).square().sum(1)
    if cost == "squared-euclidean":
        return squares
    # The square root has no gradient at 0; a pair that already coincides should pull nowhere.
    return squares.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
