"""Training of auto-encoders to reconstruct images with hidden patches."""

from __future__ import annotations

from pipelines.data.patches import hide, patch_count
from pipelines.models.autoencoder import AutoEncoder
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.spec import ReconstructionSpec


class Reconstruction:
    """One phase: the mean squared distance between the pixels of images and of their reconstructions.

    A random fraction of the patches of each image, drawn at each step, is replaced by grey in the input (Pathak et al.
    2016, "Context encoders: feature learning by inpainting"). The network learns features of images without labels. See
    :class:`pipelines.objectives.phase.Objective`.
    """

    served = "encoder"

    def __init__(self, spec: ReconstructionSpec, network: AutoEncoder) -> None:
        self.spec = spec
        self.network = network
        self.networks = {"encoder": network}
        self.phases = [Phase("encoder", network, self._loss)]

    def _loss(self, step: Step) -> Loss:
        draws = step.normal("hidden patches", patch_count(self.network.image, self.spec.patch))
        seen = hide(step.images, draws, self.spec.hidden, self.spec.patch)
        errors = (self.network(seen).float() - step.images).square().mean((1, 2, 3))
        loss = errors.sum() / step.batch
        return Loss(loss, sums={"loss": loss.detach()})
