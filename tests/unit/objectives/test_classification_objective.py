"""The loss of a classifier, compared with hand computation; mirrored images."""

import math

import numpy as np
import pytest
import torch

from pipelines.models.classifiers import Perceptron
from pipelines.models.network import Classifier
from pipelines.objectives.classification import Classification, classification_loss
from pipelines.objectives.phase import Step
from pipelines.shape import ImageShape
from pipelines.spec import ClassificationSpec

IMAGE = ImageShape(1, 2, 3)
BATCH = 64


def step(index: int = 0, share: slice = slice(0, BATCH), seed: int = 0) -> Step:
    """Create a batch of distinct images that also differ from their mirror images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, *IMAGE.dims, generator=generator)
    labels = torch.arange(BATCH) % 3
    return Step(index, images[share], labels[share], torch.arange(BATCH)[share], BATCH, share, seed)


class Watching(Classifier):
    """Records its input images."""

    def __init__(self) -> None:
        super().__init__(IMAGE, 3)
        self.seen: list[torch.Tensor] = []
        self.bias = torch.nn.Parameter(torch.zeros(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return images.flatten(1)[:, :3] + self.bias


def shown(at: Step, flip: bool = True) -> torch.Tensor:
    network = Watching()
    (phase,) = Classification(ClassificationSpec(kind="classification", flip=flip), network).phases
    phase.loss(at)
    return network.seen[0]


def by_hand(logits: np.ndarray, labels: np.ndarray, loss: str) -> np.ndarray:
    """Compute the loss from the definition, one image at a time."""
    losses = []
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        target = np.eye(len(row))[label]
        losses.append(-math.log(p[label]) if loss == "cross-entropy" else sum((p - target) ** 2))
    return np.array(losses)


@pytest.mark.parametrize("loss", ["cross-entropy", "least-squares"])
def test_a_loss_is_its_definition(loss: str) -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(7, 4)).astype(np.float32) * 3, random.integers(0, 4, 7)
    found = classification_loss(torch.from_numpy(logits), torch.from_numpy(labels), loss)
    np.testing.assert_allclose(found, by_hand(logits, labels, loss), rtol=1e-5)


def test_losses_known_by_heart() -> None:
    level, sure = torch.zeros(1, 4), torch.tensor([[0.0, 200.0, 0.0, 0.0]])
    one = torch.tensor([1])
    assert float(classification_loss(level, one, "cross-entropy")) == pytest.approx(math.log(4))
    assert float(classification_loss(level, one, "least-squares")) == pytest.approx((3 / 4) ** 2 + 3 / 16)
    for loss in ("cross-entropy", "least-squares"):
        assert float(classification_loss(sure, one, loss)) == pytest.approx(0, abs=1e-6)
    assert float(classification_loss(sure, torch.tensor([2]), "cross-entropy")) == pytest.approx(200)
    assert float(classification_loss(sure, torch.tensor([2]), "least-squares")) == pytest.approx(2)


@pytest.mark.parametrize("loss", ["cross-entropy", "least-squares"])
def test_a_phase_gives_its_ranks_part_of_the_mean_over_the_global_batch(loss: str) -> None:
    torch.manual_seed(0)
    network = Perceptron(IMAGE, 3)
    objective = Classification(ClassificationSpec(kind="classification", loss=loss), network)
    (phase,) = objective.phases
    assert phase.module is objective.networks[objective.served] is network
    assert phase.every == 1
    whole, images = phase.loss(step()), step()
    logits = network(images.images).detach()
    expected = by_hand(logits.numpy(), images.labels.numpy(), loss).mean()
    assert float(whole.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(whole.sums["loss"]) == float(whole.total.detach())
    assert float(whole.sums["train_accuracy"]) == float((logits.argmax(1) == images.labels).float().mean())
    parts = [phase.loss(step(share=share)) for share in (slice(0, 20), slice(20, 21), slice(21, 64))]
    for name, value in whole.sums.items():
        assert sum(float(part.sums[name]) for part in parts) == pytest.approx(float(value), rel=1e-5), name


def test_mirrored_images_are_a_function_of_seed_and_step() -> None:
    torch.manual_seed(1)
    first = shown(step())
    torch.manual_seed(2)
    assert torch.equal(shown(step()), first)
    assert not torch.equal(shown(step(index=1)), first)
    assert not torch.equal(shown(step(seed=1)), first)


def test_a_mirrored_image_is_itself_left_to_right() -> None:
    mirrored = 0
    for index in range(10):
        at = step(index)
        for image, original in zip(shown(at), at.images, strict=True):
            turned = torch.tensor(original.numpy()[:, :, ::-1].copy())
            assert torch.equal(image, original) != torch.equal(image, turned)
            mirrored += torch.equal(image, turned)
    # 640 fair coins: six standard deviations are 76.
    assert 244 <= mirrored <= 396


def test_ranks_mirror_what_one_process_does() -> None:
    parts = [shown(step(share=share)) for share in (slice(0, 20), slice(20, 21), slice(21, 64))]
    assert torch.equal(torch.cat(parts), shown(step()))


def test_images_are_left_as_they_are_by_default() -> None:
    assert torch.equal(shown(step(), flip=False), step().images)
