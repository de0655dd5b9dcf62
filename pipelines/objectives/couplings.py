"""Couplings of noise and images for flow matching."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from pipelines.data.loader import Split
from pipelines.data.partition import batch_indices
from pipelines.distributed import gather_rows, world_size
from pipelines.models.bundle import to_float
from pipelines.objectives.conditions import ConditionCost
from pipelines.objectives.phase import Step
from pipelines.objectives.recorded import RecordedCoupling
from pipelines.randomness import normal_rows, step_generator
from pipelines.transport.planner import Planner, Share
from pipelines.transport.stream import CouplingStream


@dataclass(frozen=True, eq=False)
class Coupled:
    """Noise for one rank's images of one step.

    Attributes:
        noise: noise vectors, (k, pixels), standard normal over all steps.
        sums, maxima: values for the curves, as in :class:`pipelines.objectives.phase.Loss`.
    """

    noise: Float32[Tensor, "k d"]
    sums: Mapping[str, float] = field(default_factory=dict)
    maxima: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Coupling(Protocol):
    """Assigns noise to each image of a step, as a pure function of the job's seed and the step."""

    def noise(self, step: Step) -> Coupled:
        """Noise for this rank's images."""
        ...


class Independent:
    """Independent noise for each image."""

    def noise(self, step: Step) -> Coupled:
        """See :class:`Coupling`."""
        return Coupled(step.normal("noise", step.images[0].numel()))


class BatchPlan:
    """Pairs along the optimal plan between noise and images of the global batch; the step waits for the plan.

    Args:
        planner: solver of the plans; every rank receives the rows of its own images.
        conditions: extra cost between classes; see :class:`ConditionCost`.
    """

    def __init__(self, planner: Planner, conditions: ConditionCost | None = None) -> None:
        self._planner, self._conditions = planner, conditions

    def noise(self, step: Step) -> Coupled:
        """See :class:`Coupling`."""
        images = step.images.flatten(1)
        noise = step.normal("noise", images.shape[1])
        x, y = images, noise
        if self._conditions is not None:
            meant = self._conditions.meant(gather_rows(step.labels), step.index)[step.share]
            x, y = self._conditions.on(images, step.labels), self._conditions.on(noise, meant)
        started = time.perf_counter()
        block = self._planner.plan_rows(Share(key=f"step-{step.index}", x=x, y=y))
        waited = time.perf_counter() - started
        columns = torch.empty(len(images), dtype=torch.int64)
        columns[torch.as_tensor(block.rows)] = torch.as_tensor(block.columns)
        return Coupled(
            gather_rows(noise)[columns.to(noise.device)],
            _times(waited, block.certificate.milliseconds),
            {"plan_relative_gap": block.certificate.relative_gap},
        )


class PoolPlan:
    """Pairs along the optimal plan between pools of noise and images much larger than the batch.

    The plans do not depend on the weights, so they are solved ahead of the training. A pool holds the images of several
    steps, in their order. All ranks request the same plan, and the transport service solves it once.

    Args:
        planner: solver of the plans.
        split: training split.
        points: number of points on each side of a pool, a multiple of ``batch``.
        batch: size of the global batch.
        seed: seed of the job.
        steps: number of steps of the job; later plans are not solved.
        conditions: extra cost between classes; see :class:`ConditionCost`.
    """

    def __init__(
        self,
        planner: Planner,
        split: Split,
        points: int,
        batch: int,
        seed: int,
        steps: int,
        conditions: ConditionCost | None = None,
    ) -> None:
        self._split, self._points, self._seed, self._conditions = split, points, seed, conditions
        self._stream = CouplingStream(planner, self._draw, pool=points, batch=batch, steps=steps)

    def noise(self, step: Step) -> Coupled:
        """See :class:`Coupling`."""
        pairs = self._stream.at(step.index)
        return Coupled(
            pairs.x[step.share, : step.images[0].numel()].to(step.images.device),
            _times(pairs.waited, pairs.certificate.milliseconds / (self._points // step.batch)),
            {"plan_relative_gap": pairs.certificate.relative_gap},
        )

    def _draw(self, number: int) -> tuple[Tensor, Tensor]:
        images, labels = self._split.take(batch_indices(len(self._split), self._seed, self._points, number))
        real = to_float(images).flatten(1)
        noise = torch.randn(real.shape, generator=step_generator(self._seed, number, "pool of noise"))
        if self._conditions is None:
            return noise, real
        meant = self._conditions.meant(labels, number)
        return self._conditions.on(noise, meant), self._conditions.on(real, labels)


class Recorded:
    """Pairs computed in advance for the whole data set.

    Args:
        coupling: recorded coupling; each epoch uses the next of its rounds, cyclically.
    """

    def __init__(self, coupling: RecordedCoupling) -> None:
        self._coupling = coupling

    def noise(self, step: Step) -> Coupled:
        """See :class:`Coupling`."""
        seeds = self._coupling.seeds
        first = step.index * step.batch
        rounds = np.arange(first, first + step.batch)[step.share] // seeds.shape[1] % seeds.shape[0]
        keys = seeds[rounds, step.indices.numpy()]
        return Coupled(normal_rows(keys, step.images[0].numel()).to(step.images.device))


def _times(waited: float, milliseconds: float) -> dict[str, float]:
    # Every rank reports its own times, and the curves show the mean over ranks.
    return {"plan_wait_ms": 1e3 * waited / world_size(), "plan_solve_ms": milliseconds / world_size()}
