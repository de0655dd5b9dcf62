"""Flow matching: training of a velocity field on straight lines between coupled noise and images."""

from __future__ import annotations

import torch

from pipelines.models.flow import FlowUNet
from pipelines.objectives.couplings import Coupling
from pipelines.objectives.phase import Loss, Phase, Step


class FlowMatching:
    """One phase: ``E ‖v(x_t, t) − (x₁ − x₀)‖²`` with ``x_t = (1 − t) x₀ + t x₁``, mean over pixels.

    See Lipman et al. 2023, eq. 23 with σ = 0. The joint distribution of noise x₀ and image x₁ is the coupling. Lines of
    independent pairs cross, which makes the learned paths curved; lines along an optimal plan cross less, so few Euler
    steps suffice (Pooladian et al. 2023; Tong et al. 2024). A conditional network receives the class of each image. See
    :class:`pipelines.objectives.phase.Objective`.

    Args:
        network: network whose velocity is trained.
        coupling: coupling of noise and images.
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
