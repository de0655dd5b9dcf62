from __future__ import annotations

import pytest
import torch

from pipelines.transport.divergence import sinkhorn_divergence


def points(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("cost", ["squared-euclidean", "euclidean", "power", "cosine"])
@pytest.mark.parametrize("side", [0, 1])
def test_gradient_by_finite_differences(cost, side):
    sets = [points(12, 0) + 0.5, points(9, 1)]
    epsilon = 0.1 if cost == "cosine" else 0.5

    def value(moved: torch.Tensor) -> torch.Tensor:
        both = [moved if place == side else other for place, other in enumerate(sets)]
        return sinkhorn_divergence(*both, epsilon=epsilon, cost=cost, power=1.5, tolerance=2e-6)

    here = sets[side].clone().requires_grad_()
    value(here).backward()
    direction = points(len(here), 2)
    step = 1e-2
    measured = (value(sets[side] + step * direction) - value(sets[side] - step * direction)) / (2 * step)
    assert float((here.grad * direction).sum()) == pytest.approx(float(measured), rel=2e-2, abs=2e-4)


def test_zero_for_equal_sets_and_positive_otherwise():
    x = points(30, 0)
    same = x.clone().requires_grad_()
    nothing = sinkhorn_divergence(same, x.flip(0), epsilon=0.5, tolerance=1e-5)
    nothing.backward()
    assert abs(float(nothing.detach())) < 1e-4
    assert float(same.grad.abs().max()) < 1e-3
    assert float(sinkhorn_divergence(x, x + 0.3, epsilon=0.5)) == pytest.approx(3 * 0.3**2, rel=0.02)


def test_images_keep_their_shape_and_type():
    x = torch.randn(6, 1, 4, 4, requires_grad=True)
    value = sinkhorn_divergence(x, torch.randn(5, 1, 4, 4), epsilon=5.0)
    value.backward()
    assert x.grad.shape == x.shape
    assert value.dtype == torch.float32
