"""Phases: the one shape that every objective gives to the training loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from pipelines.randomness import step_generator
from pipelines.spec import OptimizerSpec

POOL = "pool"
"""Among the networks of an objective, the name of a copy of the served one, by which pools of samples are drawn."""


@dataclass(frozen=True, eq=False)
class Step:
    """One rank's share of one global batch, with its randomness.

    Attributes:
        index: number of the step, from 0.
        images: (k, c, h, w) float32 in [−1, 1], on the device.
        labels: (k,) int64, on the device.
        indices: (k,) int64, the images' places in the training split.
        batch: size of the global batch.
        share: which of its places this rank holds.
        seed: of the job.
    """

    index: int
    images: Float32[Tensor, "k c h w"]
    labels: Int64[Tensor, " k"]
    indices: Int64[Tensor, " k"]
    batch: int
    share: slice
    seed: int

    def parts(self, count: int) -> list[Step]:
        """This step in consecutive parts, as even as can be; fewer than ``count`` where there are fewer images."""
        bounds = [len(self.images) * part // count for part in range(count + 1)]
        return [
            replace(
                self,
                images=self.images[begin:end],
                labels=self.labels[begin:end],
                indices=self.indices[begin:end],
                share=slice(self.share.start + begin, self.share.start + end),
            )
            for begin, end in itertools.pairwise(bounds)
            if begin < end
        ]

    def normal(self, stream: str, width: int) -> Float32[Tensor, "k {width}"]:
        """Standard normal vectors for this rank's places, (k, width).

        They are drawn for the whole batch and cut, so that the batch does not depend on the number of ranks.

        Args:
            stream: names the draw; two draws of one step that should differ have two names.
            width: of each vector.
        """
        drawn = torch.randn(self.batch, width, generator=step_generator(self.seed, self.index, stream))
        return drawn[self.share].to(self.images.device)

    def uniform(self, stream: str) -> Float32[Tensor, " k"]:
        """Uniform numbers in [0, 1) for this rank's places, (k,); see :meth:`normal`."""
        drawn = torch.rand(self.batch, generator=step_generator(self.seed, self.index, stream))
        return drawn[self.share].to(self.images.device)


@dataclass(frozen=True, eq=False)
class Loss:
    """What a phase returns.

    Attributes:
        total: scalar to differentiate: this rank's part of a mean over the *global* batch.
        sums: numbers for the curves, whose sum over ranks is meant.
        maxima: numbers for the curves, whose maximum over ranks and steps is meant.
    """

    total: Float[Tensor, ""]
    sums: Mapping[str, Tensor | float] = field(default_factory=dict)
    maxima: Mapping[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Phase:
    """One player's move.

    Attributes:
        name: of the phase, and of its curves.
        module: the network whose parameters it moves.
        loss: what it minimises.
        every: it moves at every so many steps.
        optimizer: how its weights follow gradients; as the job's by default.
        project: brings its weights back to where they may be, after each move.
    """

    name: str
    module: nn.Module
    loss: Callable[[Step], Loss]
    every: int = 1
    optimizer: OptimizerSpec | None = None
    project: Callable[[], None] | None = None


@runtime_checkable
class Objective(Protocol):
    """What a job minimises."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """All networks by name; all are saved and resumed."""
        ...

    @property
    def served(self) -> str:
        """The name of the network that is evaluated, registered and served."""
        ...

    @property
    def phases(self) -> Sequence[Phase]:
        """The moves of one step, in order."""
        ...
