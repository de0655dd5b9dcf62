"""The interface between objectives and the training loop: steps, losses and phases."""

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
"""Name, in the networks of an objective, of the copy of the served network that draws pools of samples."""


@dataclass(frozen=True, eq=False)
class Step:
    """One rank's part of one global batch, with its randomness.

    Attributes:
        index: index of the step, from 0.
        images: images, (k, c, h, w) float32 in [−1, 1], on the device.
        labels: labels, (k,) int64, on the device.
        indices: indices of the images in the training split, (k,) int64.
        batch: size of the global batch.
        share: slice of the batch that this rank holds.
        seed: seed of the job.
    """

    index: int
    images: Float32[Tensor, "k c h w"]
    labels: Int64[Tensor, " k"]
    indices: Int64[Tensor, " k"]
    batch: int
    share: slice
    seed: int

    def parts(self, count: int) -> list[Step]:
        """Split this step into at most ``count`` consecutive, non-empty parts of nearly equal size."""
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
        """Draw standard normal vectors for this rank's share, (k, width).

        They are drawn for the whole batch and sliced, so the batch does not depend on the number of ranks.

        Args:
            stream: name of the draw; independent draws of one step need different names.
            width: dimension of the vectors.
        """
        drawn = torch.randn(self.batch, width, generator=step_generator(self.seed, self.index, stream))
        return drawn[self.share].to(self.images.device)

    def uniform(self, stream: str) -> Float32[Tensor, " k"]:
        """Draw uniform numbers in [0, 1) for this rank's share, (k,); see :meth:`normal`."""
        drawn = torch.rand(self.batch, generator=step_generator(self.seed, self.index, stream))
        return drawn[self.share].to(self.images.device)


@dataclass(frozen=True, eq=False)
class Loss:
    """Loss of a phase, with values for the curves.

    Attributes:
        total: scalar to differentiate, this rank's part of a mean over the *global* batch. For losses of single images,
            it is their sum over ``step.images`` divided by ``step.batch``. Gradients are summed over parts and ranks.
        sums: values for the curves, by name: summed over parts and ranks, then averaged over the updates since the last
            point of the curve.
        maxima: values for the curves whose maximum over ranks and steps is reported.
    """

    total: Float[Tensor, ""]
    sums: Mapping[str, Tensor | float] = field(default_factory=dict)
    maxima: Mapping[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Phase:
    """A network that is trained, with its optimizer and its loss.

    Attributes:
        name: name of the phase and of its curves.
        module: network whose parameters are updated.
        loss: function that computes the loss of a step.
        every: number of steps per update.
        optimizer: spec of the optimizer; by default that of the job.
        project: function that projects the weights onto their constraint set after each update.
    """

    name: str
    module: nn.Module
    loss: Callable[[Step], Loss]
    every: int = 1
    optimizer: OptimizerSpec | None = None
    project: Callable[[], None] | None = None


@runtime_checkable
class Objective(Protocol):
    """Objective of a job: its networks and phases."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """All networks by name; all are saved and resumed."""
        ...

    @property
    def served(self) -> str:
        """Name of the network that is evaluated, registered and served."""
        ...

    @property
    def phases(self) -> Sequence[Phase]:
        """Phases of one step, in order."""
        ...
