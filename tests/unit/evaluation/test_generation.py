"""The distance of a generator to held-out images, its lower reference and its baseline."""

import numpy as np
import ot
import pytest
import torch
from runs import CPU
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from pipelines.data.loader import Split
from pipelines.data.shards import MappedShards
from pipelines.errors import DivergedError
from pipelines.evaluation import generation
from pipelines.evaluation.generation import TransportJudge, sample
from pipelines.models.network import Generator
from pipelines.shape import ImageShape
from pipelines.transport.plan import TransportPlan
from pipelines.transport.planner import LocalPlanner
from pipelines.transport.problem import TransportProblem

IMAGE = ImageShape(1, 4, 4)


def split(name: str, images: np.ndarray) -> Split:
    return Split(name, MappedShards([images]), np.arange(len(images)), np.zeros(len(images), np.int64))


def spots(count: int, seed: int) -> np.ndarray:
    """Create dark images with one bright quarter, each equally frequent: far from Gaussian."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 20, (count, 4, 4))
    for place, image in enumerate(images):
        row, column = place // 2 % 2, place % 2
        image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 210
    return images[:, None].astype(np.uint8)


class Fixed(Generator):
    """Returns fixed images for any latent vectors."""

    def __init__(self, images: np.ndarray) -> None:
        super().__init__(IMAGE, latent=2)
        self.images = torch.from_numpy(images).float() / 127.5 - 1
        self.given = 0

    def forward(self, latents: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
        start = self.given % len(self.images)
        self.given += len(latents)
        return self.images[start : start + len(latents)]


class Counting(LocalPlanner):
    def __init__(self) -> None:
        self.calls = 0

    def plan(self, problem: TransportProblem) -> TransportPlan:
        self.calls += 1
        return super().plan(problem)


def judge(train: np.ndarray, test: np.ndarray, planner: LocalPlanner | None = None, seed: int = 0) -> TransportJudge:
    planner = planner or LocalPlanner()
    return TransportJudge(split("train", train), split("test", test), "squared-euclidean", planner, seed)


def by_hand(x: np.ndarray, y: np.ndarray) -> float:
    costs = cdist(x.reshape(len(x), -1) / 127.5, y.reshape(len(y), -1) / 127.5, "sqeuclidean")
    return float(costs[linear_sum_assignment(costs)].mean())


def test_real_against_real_is_the_floor() -> None:
    train, test = spots(40, seed=1), spots(40, seed=2)
    distances = judge(train, test).judge(Fixed(train[::-1].copy()), CPU)
    assert distances.real_floor == pytest.approx(by_hand(train, test), rel=1e-5)
    assert distances.generator == pytest.approx(distances.real_floor, rel=1e-5)
    assert distances.points == 40
    assert distances.max_gap < 1e-5
    assert distances.solver


def test_the_sliced_distance_stands_beside_the_exact_one() -> None:
    """Compares with POT on the same sets, with POT's own projections."""
    train, test = spots(40, seed=1), spots(40, seed=2)
    noise = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    found = judge(train, test).judge(Fixed(noise), CPU)
    for value, images in ((found.sliced, noise), (found.sliced_real, train)):
        sides = (side.reshape(40, -1) / 127.5 for side in (images, test))
        expected = ot.sliced_wasserstein_distance(*sides, n_projections=4000, seed=0) ** 2
        assert value == pytest.approx(expected, rel=0.3)
    assert found.sliced_real < found.sliced_gaussian < found.sliced
    # Projections bring points closer.
    assert found.sliced < found.generator / 16 * 1.3
    other = TransportJudge(split("train", train), split("test", test), "euclidean", LocalPlanner(), 0)
    assert other.judge(Fixed(noise), CPU).sliced == found.sliced


def test_held_out_images_themselves_are_no_distance_away() -> None:
    train, test = spots(40, seed=1), spots(40, seed=2)
    assert judge(train, test).judge(Fixed(test[::-1].copy()), CPU).generator == pytest.approx(0, abs=1e-5)


def test_a_gaussian_is_farther_than_real_images_and_noise_farther_still() -> None:
    train, test = spots(64, seed=1), spots(64, seed=2)
    noise = np.random.default_rng(0).integers(0, 256, (64, 1, 4, 4), dtype=np.uint8)
    distances = judge(train, test).judge(Fixed(noise), CPU)
    assert 2 * distances.real_floor < distances.gaussian_baseline < 0.7 * distances.generator


def test_sets_of_one_image_are_known_by_heart() -> None:
    """All training images are equal, so their Gaussian is one point, at the same distance to the held-out images."""
    train, test = np.full((9, 1, 4, 4), 200, np.uint8), np.full((5, 1, 4, 4), 100, np.uint8)
    distances = judge(train, test).judge(Fixed(np.full((5, 1, 4, 4), 151, np.uint8)), CPU)
    assert distances.points == 5
    assert distances.real_floor == pytest.approx(16 * (100 / 127.5) ** 2, rel=1e-5)
    assert distances.gaussian_baseline == pytest.approx(distances.real_floor, rel=1e-5)
    assert distances.generator == pytest.approx(16 * (51 / 127.5) ** 2, rel=1e-5)


def test_the_gaussian_has_the_mean_and_covariance_of_the_training_images() -> None:
    points: list[torch.Tensor] = []

    class Keeping(LocalPlanner):
        def plan(self, problem: TransportProblem) -> TransportPlan:
            points.append(torch.as_tensor(problem.x))
            return super().plan(problem)

    # Far from the limits of a pixel, so that nothing is clipped.
    base = np.random.default_rng(0).normal(size=(600, 3)) @ np.random.default_rng(1).normal(size=(3, 16))
    train = (128 + 10 * base).round().astype(np.uint8).reshape(-1, 1, 4, 4)
    judge(train, train, Keeping()).judge(Fixed(train), CPU)
    gaussian, real = points[1].double(), torch.from_numpy(train).double().flatten(1) / 127.5 - 1
    spread = real.std(0).mean()
    assert float((gaussian.mean(0) - real.mean(0)).abs().max() / spread) < 0.25
    assert float((gaussian.T.cov() - real.T.cov()).norm() / real.T.cov().norm()) < 0.15


def test_baselines_are_computed_once() -> None:
    planner = Counting()
    train, test = spots(20, seed=1), spots(10, seed=2)
    judged = judge(train, test, planner)
    first = judged.judge(Fixed(train[:10]), CPU)
    assert planner.calls == 3
    second = judged.judge(Fixed(train[10:]), CPU)
    assert planner.calls == 4
    assert (first.real_floor, first.gaussian_baseline) == (second.real_floor, second.gaussian_baseline)
    assert first.generator != second.generator


def test_points_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LARGEST_SET", 7)
    train, test = spots(20, seed=1), spots(10, seed=2)
    assert judge(train, test).judge(Fixed(train[:7]), CPU).points == 7


def test_the_same_seed_gives_the_same_numbers() -> None:
    train, test = spots(30, seed=1), spots(20, seed=2)
    first, again, other = (judge(train, test, seed=seed).judge(Fixed(train[:20]), CPU) for seed in (3, 3, 4))
    assert first == again
    assert first.gaussian_baseline != other.gaussian_baseline
    assert first.real_floor != other.real_floor


def test_samples_are_of_the_seed_alone_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Projecting(Generator):
        def __init__(self) -> None:
            super().__init__(IMAGE, latent=16)
            self.modes: set[bool] = set()

        def forward(self, latents: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
            self.modes.add(self.training)
            return latents.view(-1, *IMAGE.dims).tanh()

    generator = Projecting().train()
    samples = sample(generator, 10, 3, CPU)
    assert samples.shape == (10, 1, 4, 4)
    parts = [sample(generator, 10, 3, CPU, part) for part in (slice(0, 3), slice(3, 4), slice(4, 10))]
    assert torch.equal(torch.cat(parts), samples)
    monkeypatch.setattr(generation, "BATCH", 3)
    assert torch.equal(sample(generator, 10, 3, CPU), samples)
    assert not torch.equal(sample(generator, 10, 4, CPU), samples)
    assert generator.modes == {False}
    assert generator.training


def test_samples_that_are_not_finite_have_diverged() -> None:
    class Diverged(Generator):
        def forward(self, latents: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
            return latents.new_full((len(latents), *IMAGE.dims), torch.nan)

    with pytest.raises(DivergedError, match="samples are not finite"):
        judge(spots(30, seed=1), spots(20, seed=2)).judge(Diverged(IMAGE, latent=4), CPU)
