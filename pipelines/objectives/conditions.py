"""Class-dependent costs of plans between noise and images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from pipelines.randomness import step_generator
from pipelines.transport.cost import with_known_conditions


@dataclass(frozen=True)
class ConditionCost:
    """Extra cost of a plan for pairing noise of one class with an image of another class.

    Without it, the noise of an image is correlated with its class: a conditional flow is then trained on class-specific
    noise, but receives all noise at inference (Cheng & Schwing 2025, "The curse of conditions").

    Attributes:
        classes: number of classes.
        weight: extra cost, in units of the cost.
        seed: seed of the job.
    """

    classes: int
    weight: float
    seed: int

    def meant(self, labels: Int64[Tensor, " n"], number: int) -> Int64[Tensor, " n"]:
        """Classes of the noise vectors: a random permutation of those of the images."""
        order = torch.randperm(len(labels), generator=step_generator(self.seed, number, "classes of noise"))
        return labels[order.to(labels.device)]

    def on(self, points: Float32[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> Float32[Tensor, "n e"]:
        """Append the classes to points as further coordinates."""
        return with_known_conditions(points, labels, self.classes, self.weight)
