"""Networks that discriminate: the article's least squares, and cross-entropy."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from pipelines.models.network import Classifier
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.spec import ClassificationSpec


class Classification:
    """One phase: the mean loss between predictions and labels. See :class:`pipelines.objectives.phase.Objective`."""

    served = "classifier"

    def __init__(self, spec: ClassificationSpec, classifier: Classifier) -> None:
        self.spec = spec
        self.classifier = classifier
        self.networks = {"classifier": classifier}
        self.phases = [Phase("classifier", classifier, self._loss)]

    def _loss(self, step: Step) -> Loss:
        images = _mirror(step.images, step.uniform("mirror")) if self.spec.flip else step.images
        logits = self.classifier(images)
        loss = classification_loss(logits, step.labels, self.spec.loss).sum() / step.batch
        correct = (logits.argmax(1) == step.labels).sum() / step.batch
        return Loss(loss, sums={"loss": loss.detach(), "train_accuracy": correct})


def classification_loss(
    logits: Float[Tensor, "b classes"], labels: Int64[Tensor, " b"], loss: str
) -> Float[Tensor, " b"]:
    """Loss of each prediction.

    Args:
        logits: (b, classes).
        labels: (b,) int64.
        loss: ``cross-entropy`` −log p_label, or ``least-squares`` ‖p − e_label‖², with p the softmax of the logits and
            e the basis vectors: the article's own empirical risk, on probabilities.

    Returns:
        (b,) tensor.
    """
    if loss == "cross-entropy":
        return F.cross_entropy(logits, labels, reduction="none")
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return (logits.softmax(1) - targets).square().sum(1)


def _mirror(images: Float[Tensor, "b c h w"], uniform: Float32[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    return torch.where((uniform < 0.5)[:, None, None, None], images.flip(3), images)
