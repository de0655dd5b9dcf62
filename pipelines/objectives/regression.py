"""Regression of a continuous function."""

from __future__ import annotations

from pipelines.data.targets import target
from pipelines.models.network import Classifier
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.spec import RegressionSpec


class Regression:
    """One phase: the mean squared distance between the single output of a network and a function of its input.

    A two-layer network approximates any continuous function on a compact set arbitrarily well if it is wide enough
    (Cybenko, *Approximation by superpositions of a sigmoidal function*, 1989, theorem 2; for ReLU Leshno et al. 1993,
    theorem 1). See :class:`pipelines.objectives.phase.Objective`.
    """

    served = "regressor"

    def __init__(self, spec: RegressionSpec, network: Classifier) -> None:
        self.spec = spec
        self.networks = {"regressor": network}
        self.phases = [Phase("regressor", network, self._loss)]

    def _loss(self, step: Step) -> Loss:
        outputs = self.networks["regressor"](step.images)[:, 0]
        loss = (outputs - target(step.images, self.spec.target)).square().sum() / step.batch
        return Loss(loss, sums={"loss": loss.detach()})
