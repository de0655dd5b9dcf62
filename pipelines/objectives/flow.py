"""Flow matching: a velocity field that carries noise to images along straight lines between coupled pairs."""

from __future__ import annotations

import torch

from pipelines.models.flow import FlowUNet
from pipelines.objectives.couplings import Coupling
from pipelines.objectives.phase import Loss, Phase, Step


class FlowMatching:
    """One phase: ``E ‖v(x_t, t) − (x₁ − x₀)‖²`` with ``x_t = (1 − t) x₀ + t x₁``, mean over pixels.

    Lipman et al. 2023, eq. 23 with σ = 0. The law of the pairs (noise x₀, image x₁) is the coupling: independent pairs
    give paths that cross, which the mean velocity bends; pairs along an optimal plan cross less, so that few Euler
    steps follow them (Pooladian et al. 2023; Tong et al. 2024). A conditional network is told each image's class. See
    :class:`pipelines.objectives.phase.Objective`.

    Args:
        network: whose velocity is trained.
        coupling: gives the noise of each image.
    """

    served = "flow"

    def __init__(self, network: FlowUNet, coupling: Coupling) -> None:
        self.network = network
        self.coupling = coupling
        self.networks = {"flow": network}
        self.phases = [Phase("flow", network, self._loss)]

    def _loss(self, step: Step) -> Loss:
        coupled = self.coupling.noise(step)
        noise = coupled.noise.view_as(step.images)
        times = step.uniform("times")
        t = times[:, None, None, None]
        asked = self.network.asked(step.labels)
        velocity = self.network.velocity(torch.lerp(noise, step.images, t), times, asked)
        wanted = step.images - noise
        loss = (velocity - wanted).square().flatten(1).mean(1).sum() / step.batch
        straightness = wanted.square().flatten(1).sum(1).sum() / step.batch
        return Loss(
            loss,
            sums={"loss": loss.detach(), "pair_cost": straightness, **coupled.sums},
            maxima=coupled.maxima,
        )
