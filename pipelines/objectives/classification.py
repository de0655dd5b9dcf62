"""Classification by cross-entropy or least squares."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from pipelines.models.network import Classifier
from pipelines.objectives.augmentation import augmented, mixed
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
        images, labels = augmented(step, self.spec), step.labels
        if self.spec.mixes:
            mixture = mixed(images, step, self.spec)
            logits = self.classifier(mixture.images)
            # Mixing losses instead of labels is the same for cross-entropy, and for least squares up to a constant.
            own, other = (self._each(logits, classes) for classes in (labels, mixture.labels))
            each = mixture.weights * own + (1 - mixture.weights) * other
            labels = torch.where(mixture.weights < 0.5, mixture.labels, labels)
        else:
            logits = self.classifier(images)
            each = self._each(logits, labels)
        loss = each.sum() / step.batch
        correct = (logits.argmax(1) == labels).sum() / step.batch
        return Loss(loss, sums={"loss": loss.detach(), "train_accuracy": correct})

    def _each(self, logits: Float[Tensor, "b classes"], labels: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
        return classification_loss(logits, labels, self.spec.loss, self.spec.label_smoothing)


def classification_loss(
    logits: Float[Tensor, "b classes"], labels: Int64[Tensor, " b"], loss: str, smoothing: float = 0.0
) -> Float[Tensor, " b"]:
    """Compute the loss of each prediction.

    Args:
        logits: logits, (b, classes).
        labels: labels, (b,) int64.
        loss: ``cross-entropy`` −log p_label, or ``least-squares`` ‖p − e_label‖², with p the softmax of the logits and
            e the basis vectors; the latter is the empirical risk of the article, on probabilities.
        smoothing: fraction of each label that is spread evenly over all classes (Szegedy et al. 2016, section 7).

    Returns:
        Losses, (b,).
    """
    if loss == "cross-entropy":
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[1]
    return (logits.softmax(1) - targets).square().sum(1)
