"""Transport distances between a generator's samples and held-out images: exact and sliced."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pipelines.data.loader import Split
from pipelines.distributed import gather_parts
from pipelines.errors import DivergedError
from pipelines.models.bundle import to_float
from pipelines.models.network import Generator
from pipelines.randomness import step_generator
from pipelines.spec import CostName
from pipelines.transport.planner import Planner
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import sliced

LARGEST_SET = 1024
"""Largest number of points on each side of a plan; fixed, because the distance between finite sets depends on it."""

FITTED = 4096
"""Largest number of training images, evenly spaced, to which the Gaussian baseline is fitted."""


BATCH = 256
"""Number of samples drawn at once."""


@dataclass(frozen=True)
class TransportDistances:
    """Mean transport costs to the same held-out images.

    Attributes:
        generator: cost of the generator's samples.
        gaussian_baseline: cost of samples of a Gaussian fitted to the training images.
        real_floor: cost of training images, which a perfect generator would have.
        points: number of images on each side.
        max_gap: largest relative duality gap of the plans.
        solver: name of the solver.
        sliced, sliced_gaussian, sliced_real: sliced distances of the same three sets, for any cost of the plans; see
            :func:`pipelines.transport.solvers.sliced.distance`.
        spread: ratio of the variance of the samples' pixels to that of the held-out images; near 0 if all samples are
            the same image.
    """

    generator: float
    gaussian_baseline: float
    real_floor: float
    points: int
    max_gap: float
    solver: str
    sliced: float
    sliced_gaussian: float
    sliced_real: float
    spread: float


@dataclass(frozen=True)
class _Distance:
    """Distance between one set and the held-out images."""

    exact: float
    gap: float
    solver: str
    sliced: float


class TransportJudge:
    """Computes distances between samples and held-out images; the baseline and the floor are computed once.

    Args:
        train: training split.
        test: held-out split.
        cost: cost between images, with pixels in [−1, 1].
        planner: solver of the plans.
        seed: seed of all draws.
        power: exponent of the cost ``power``.
    """

    def __init__(
        self, train: Split, test: Split, cost: CostName, planner: Planner, seed: int, power: float = 2.0
    ) -> None:
        self._planner = planner
        self._cost: CostName = cost
        self._power = power
        self._seed = seed
        self._points = min(LARGEST_SET, len(test), len(train))
        self._train, self._test = train, test
        self._baselines: tuple[_Distance, _Distance] | None = None

    def judge(self, generator: Generator, device: torch.device) -> TransportDistances:
        """Distances of a generator's samples, always for the same latent vectors.

        Raises:
            DivergedError: a sample is not finite.
        """
        return self.distances(self.samples(generator, device))

    def samples(self, generator: Generator, device: torch.device) -> torch.Tensor:
        """Draw the samples of the evaluation, (points, c, h, w). Collective: each rank draws a part and receives all.

        Raises:
            DivergedError: a sample is not finite.
        """
        return shared_samples(generator, self._points, self._seed, device)

    def distances(self, samples: torch.Tensor) -> TransportDistances:
        """Distances of the samples of :meth:`samples`; not collective."""
        found = self._distance(samples.flatten(1).cpu())
        if self._baselines is None:
            drawn = gaussian(self._train, self._points, self._seed).flatten(1)
            self._baselines = self._distance(drawn), self._distance(self._draw(self._train, "floor"))
        baseline, floor = self._baselines
        return TransportDistances(
            generator=found.exact,
            gaussian_baseline=baseline.exact,
            real_floor=floor.exact,
            points=self._points,
            max_gap=max(found.gap, baseline.gap, floor.gap),
            solver=found.solver,
            sliced=found.sliced,
            sliced_gaussian=baseline.sliced,
            sliced_real=floor.sliced,
            spread=float(samples.flatten(1).cpu().var(0).sum() / self._held_out.var(0).sum().clamp_min(1e-12)),
        )

    @cached_property
    def _held_out(self) -> torch.Tensor:
        """Held-out images, which only the rank that computes distances reads."""
        return self._draw(self._test, "held-out")

    def _draw(self, split: Split, stream: str) -> torch.Tensor:
        order = torch.randperm(len(split), generator=step_generator(self._seed, 0, stream))
        images, _ = split.take(order[: self._points].numpy())
        return to_float(images).flatten(1)

    def _distance(self, points: torch.Tensor) -> _Distance:
        plan = self._planner.plan(TransportProblem.between(points, self._held_out, cost=self._cost, power=self._power))
        projected = TransportProblem.between(points, self._held_out)
        certificate = plan.certificate
        return _Distance(
            certificate.primal,
            certificate.relative_gap,
            certificate.solver,
            sliced.distance(projected, seed=self._seed),
        )


def gaussian(train: Split, count: int, seed: int, part: slice = slice(None)) -> torch.Tensor:
    """Draw samples of the Gaussian with the mean and covariance of the training images, clipped to [−1, 1].

    A standard normal combination of the centred images has their covariance, so the covariance matrix is never formed.

    Args:
        train: training split.
        count: total number of samples.
        seed: seed of the draw.
        part: slice of the samples to draw; by default all.

    Returns:
        Samples, (k, c, h, w).
    """
    images, _ = train.take(np.linspace(0, len(train) - 1, min(len(train), FITTED)).astype(np.int64))
    pixels = to_float(images).flatten(1)
    weights = torch.randn(count, len(pixels), generator=step_generator(seed, 0, "gaussian"))[part]
    drawn = pixels.mean(0) + weights @ (pixels - pixels.mean(0)) / (len(pixels) - 1) ** 0.5
    return drawn.clamp(-1, 1).view(len(weights), *images.shape[1:])


def shared_samples(generator: Generator, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """Draw samples like :func:`sample`, (count, c, h, w). Collective: each rank draws a part and receives all.

    Raises:
        DivergedError: a sample is not finite.
    """
    (samples,) = gather_parts(count, BATCH, lambda part: [sample(generator, count, seed, device, part)])
    if not samples.isfinite().all():
        raise DivergedError("the generator's samples are not finite", hint="lower optimizer.learning_rate")
    return samples


@torch.inference_mode()
def sample(
    generator: Generator, count: int, seed: int, device: torch.device, part: slice = slice(None)
) -> torch.Tensor:
    """Draw samples from latent vectors that depend only on the seed.

    For a conditional generator, they cycle through the classes.

    Args:
        generator: generator of the samples.
        count: total number of samples.
        seed: seed of the latent vectors.
        device: device of the generator.
        part: slice of the samples to draw; by default all.

    Returns:
        Samples, (k, c, h, w) in [−1, 1], where k is the length of the part.
    """
    latents = torch.randn(count, generator.latent, generator=step_generator(seed, 0, "fixed latents"))[part]
    was_training = generator.training
    generator.eval()
    conditions = generator.in_turn(count, device)
    conditions = None if conditions is None else conditions[part]
    samples = torch.cat(
        [
            generator(latents[span].to(device), None if conditions is None else conditions[span])
            for span in (slice(start, start + BATCH) for start in range(0, len(latents), BATCH))
        ]
    )
    generator.train(was_training)
    return samples
