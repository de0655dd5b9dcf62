"""Costs between points."""

import numpy as np
import pytest
import torch
from solving import COSTS, costs_between

from pipelines.spec import CostName
from pipelines.transport.cost import matched_cost, pairwise_cost
from pipelines.transport.problem import TransportProblem
from pipelines.transport.true_cost import cost_matrix


def points(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("cost", COSTS)
def test_costs_are_their_definitions(cost: CostName) -> None:
    x, y = points(5, 3, 0), points(4, 3, 1)
    expected = costs_between(x.numpy(), y.numpy(), cost)
    np.testing.assert_allclose(pairwise_cost(x, y, cost), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(matched_cost(x[:4], y, cost), np.diagonal(expected), rtol=1e-5, atol=1e-6)
    matrix = cost_matrix(TransportProblem.between(x, y, cost=cost))
    assert matrix.dtype == torch.float64
    np.testing.assert_allclose(matrix, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("cost", COSTS)
def test_costs_have_gradients(cost: CostName) -> None:
    x, y = points(3, 2, 0, torch.float64).requires_grad_(), points(3, 2, 1, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda u, v: matched_cost(u, v, cost), (x, y))
    rows = torch.autograd.grad(matched_cost(x, y, cost).sum(), x)[0]
    found = torch.autograd.grad(pairwise_cost(x, y, cost).diagonal().sum(), x)[0]
    torch.testing.assert_close(found, rows)


def test_a_common_offset_costs_no_digits() -> None:
    x, y = points(20, 8, 0), points(20, 8, 1)
    offset = torch.full((8,), 1024.0)
    far_x, far_y = x + offset, y + offset
    expected = costs_between(far_x.numpy(), far_y.numpy(), "squared-euclidean")
    np.testing.assert_allclose(pairwise_cost(far_x, far_y, "squared-euclidean"), expected, rtol=1e-5)


@pytest.mark.parametrize("cost", COSTS)
def test_costs_are_not_negative(cost: CostName) -> None:
    x = points(30, 4, 0) * 1e3
    assert float(pairwise_cost(x, x.clone(), cost).min()) >= 0


def test_pairs_that_coincide_pull_nowhere() -> None:
    x = points(3, 2, 0).requires_grad_()
    matched_cost(x, x.detach().clone(), "euclidean").sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(3, 2))


def test_a_matrix_that_is_given_is_the_cost() -> None:
    matrix = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(cost_matrix(TransportProblem.from_cost(matrix)), matrix)
    with_points = TransportProblem.between(np.zeros((2, 1)), np.zeros((3, 1))).with_matrix(torch.as_tensor(matrix))
    assert np.array_equal(cost_matrix(with_points), matrix)
