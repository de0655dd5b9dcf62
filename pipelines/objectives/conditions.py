"""Plans that know of classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from pipelines.randomness import step_generator
from pipelines.transport.cost import with_known_conditions


@dataclass(frozen=True)
class ConditionCost:
    """What a plan pays for pairing noise that is meant for one class with an image of another.

    Without it the noise of an image says something of its class: a conditional flow learns to start from noise of
    that kind, and at inference meets all kinds (Cheng & Schwing 2025, "The curse of conditions").

    Attributes:
        classes: their number.
        weight: what is paid, in units of the cost.
        seed: of the job.
    """

    classes: int
    weight: float
    seed: int

    def meant(self, labels: Int64[Tensor, " n"], number: int) -> Int64[Tensor, " n"]:
        """The classes that noise is meant for: those of the images, in an order of their own."""
        order = torch.randperm(len(labels), generator=step_generator(self.seed, number, "classes of noise"))
        return labels[order.to(labels.device)]

    def on(self, points: Float32[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> Float32[Tensor, "n e"]:
        """Points with their classes as coordinates behind their own; labels are those of the data set."""
        return with_known_conditions(points, labels, self.classes, self.weight)
