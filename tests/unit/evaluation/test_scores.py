"""Scores between sets of features, compared with known values, brute force and torchmetrics."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pipelines.evaluation import scores
from pipelines.evaluation.scores import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    Neighbourhoods,
    frechet_distance,
    kernel_distance,
    nearest,
    neighbourhood_scores,
)


def rows(count: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def scored(real: torch.Tensor, generated: torch.Tensor) -> tuple[float, float, float, float]:
    """Compute precision, recall, density and coverage."""
    found = neighbourhood_scores(Neighbourhoods.of(real, PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS), generated)
    return found["precision"], found["recall"], found["density"], found["coverage"]


@pytest.fixture(params=[7, 1024])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Use several blocks, the last one smaller, or one block."""
    monkeypatch.setattr(scores, "BLOCK", request.param)
    return int(request.param)


def with_moments(mean: torch.Tensor, root: torch.Tensor, count: int = 400) -> torch.Tensor:
    """Create rows whose mean and covariance are exactly ``mean`` and ``root rootᵀ``."""
    drawn = rows(count, len(mean), seed=9).double()
    drawn = drawn - drawn.mean(0)
    whitened = drawn @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(drawn.T))).T
    return whitened @ root.double().T + mean.double()


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5])
    one, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0])
    # Of covariances that commute, the distance is that of the roots.
    expected = float(mean.square().sum() + (one - other).square().sum())
    found = frechet_distance(with_moments(torch.zeros(3), one.diag()), with_moments(mean, other.diag()))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_in_one_dimension_and_of_singular_covariances() -> None:
    assert frechet_distance(rows(50, 1), rows(50, 1) + 3) == pytest.approx(9, rel=1e-5)
    flat = rows(40, 3) @ torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert frechet_distance(flat, 2 * flat) == pytest.approx(float(flat.square().sum(0)[0] / 39), rel=0.1)
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_the_published_formula() -> None:
    """Uses SciPy's root of the product; the implementation uses the root of a symmetric matrix."""
    real, generated = rows(200, 12), rows(150, 12, seed=1) @ rows(12, 12, seed=2) * 0.4 + 0.3
    one, other = (np.cov(side.numpy().astype(np.float64), rowvar=False) for side in (real, generated))
    gap = real.double().mean(0) - generated.double().mean(0)
    expected = float(gap.square().sum()) + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-6)


class Given(nn.Module):
    """Returns images as features."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def as_bytes(seed: int, shift: float) -> torch.Tensor:
    return (rows(60, seed=seed, shift=shift) * 30 + 120).clamp(0, 255).to(torch.uint8).view(60, 6, 1, 1)


def test_torchmetrics_says_the_same() -> None:
    real, generated = as_bytes(1, 0), as_bytes(2, 0.5)
    fid = FrechetInceptionDistance(feature=Given(), input_img_size=(6, 1, 1))
    kid = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=60)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(generated, real=False)
    features = real.flatten(1).float(), generated.flatten(1).float()
    assert frechet_distance(*features) == pytest.approx(float(fid.compute()), rel=1e-5)
    assert kernel_distance(*features) == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_kernel_distance_is_unbiased(block: int) -> None:
    """The mean over many draws from one distribution is 0, and the value equals the definition."""
    draws = [kernel_distance(rows(30, 3, seed=2 * k), rows(30, 3, seed=2 * k + 1)) for k in range(60)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / 60**0.5
    x, y = rows(9, 3).double(), rows(11, 3, seed=1, shift=1).double()
    kernel = {key: (a @ b.T / 3 + 1) ** 3 for key, a, b in (("xx", x, x), ("yy", y, y), ("xy", x, y))}
    expected = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel["xx"], kernel["yy"]))
    expected -= 2 * kernel["xy"].mean()
    assert kernel_distance(x, y) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance])
def test_one_row_has_no_spread(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="2 rows"):
        measure(rows(1), rows(5))


def brute_force(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float, float]:
    """Compute precision, density and coverage row by row."""
    inside = np.zeros((len(generated), len(real)), bool)
    for j, centre in enumerate(real):
        radius = np.sort(np.linalg.norm(real - centre, axis=1))[k]
        for i, row in enumerate(generated):
            inside[i, j] = np.linalg.norm(row - centre) <= radius
    return inside.any(1).mean(), inside.sum() / (k * len(generated)), inside.any(0).mean()


def test_neighbourhoods_by_brute_force(block: int) -> None:
    real, generated = rows(40, 3), 0.6 * rows(30, 3, seed=1) + 0.4
    precision, _, _ = brute_force(real.numpy(), generated.numpy(), 3)
    recall, _, _ = brute_force(generated.numpy(), real.numpy(), 3)
    _, density, coverage = brute_force(real.numpy(), generated.numpy(), 5)
    assert 0 < recall < precision < 1
    assert scored(real, generated) == pytest.approx((precision, recall, density, coverage))


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_neighbourhoods_far_from_the_origin(offset: float, block: int) -> None:
    """Features may be far from the origin; multiples of 1/16 are exact there."""
    real, generated = ((side * 16).round() / 16 for side in (rows(60, 8), 0.9 * rows(60, 8, seed=1)))
    assert scored(real + offset, generated + offset) == pytest.approx(scored(real, generated))


def test_neighbourhoods_of_equal_and_of_distant_sets(block: int) -> None:
    real = rows(50)
    precision, recall, _, coverage = scored(real, real)
    assert (precision, recall, coverage) == (1, 1, 1)
    assert scored(real, real + 100) == (0, 0, 0, 0)
    collapsed = real[:1].expand(50, -1)
    precision, recall, _, _ = scored(real, collapsed)
    assert (precision, recall) == (1, 0.02)
    with pytest.raises(ValueError, match="4 rows have no 5 neighbours"):
        scored(rows(4), real)
    with pytest.raises(ValueError, match="3 rows have no 3 neighbours"):
        scored(real, rows(3))


def test_the_nearest_come_in_order(block: int) -> None:
    points, queries = rows(30), rows(20, seed=3)
    found = nearest(queries, points, 4).numpy()
    for query, near in zip(queries.numpy(), found, strict=True):
        assert near.tolist() == np.argsort(np.linalg.norm(points.numpy() - query, axis=1))[:4].tolist()
