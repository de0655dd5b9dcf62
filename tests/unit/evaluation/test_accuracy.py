"""Accuracy of a classifier, compared with hand computation."""

import numpy as np
import pytest
import torch
from runs import CPU

from pipelines.data.loader import Split
from pipelines.data.shards import MappedShards
from pipelines.evaluation.classification import EXAMPLES, accuracy, predictions
from pipelines.models.bundle import to_float
from pipelines.models.network import Classifier
from pipelines.shape import ImageShape

IMAGE = ImageShape(1, 1, 3)


class Reading(Classifier):
    """Returns the three pixels of an image as logits; returns other values in training mode."""

    def __init__(self) -> None:
        super().__init__(IMAGE, 3)
        self.batches: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        logits = images.flatten(1)
        return -logits if self.training else logits


PIXELS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 255), (200, 100, 0), (0, 100, 200), (9, 8, 7)]
LABELS = [0, 1, 2, 0, 1, 2, 2]  # the fourth, fifth and seventh are wrong


def split() -> Split:
    images = np.array(PIXELS, dtype=np.uint8).reshape(-1, *IMAGE.dims)
    return Split("test", MappedShards([images]), np.arange(len(images)), np.array(LABELS))


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_accuracy_and_loss_by_hand(batch: int) -> None:
    network = Reading()
    found = accuracy(network, split(), CPU, batch=batch)
    assert found["accuracy"] == pytest.approx(4 / 7)
    odds = np.exp(np.array(PIXELS) / 127.5 - 1)
    chosen = odds[np.arange(7), LABELS] / odds.sum(1)
    assert found["loss"] == pytest.approx(-np.log(chosen).mean(), rel=1e-6)
    assert max(network.batches) == min(batch, 7)
    assert sum(network.batches) == 7


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_judged_as_it_will_be_served_and_left_as_it_was(training: bool) -> None:
    network = Reading().train(training)
    assert accuracy(network, split(), CPU)["accuracy"] == pytest.approx(4 / 7)
    assert network.training is training
    predictions(network, split(), ("a", "b", "c"), CPU)
    assert network.training is training


def test_a_picture_of_predictions() -> None:
    picture = predictions(Reading(), split(), ("a", "b", "c"), CPU)
    assert picture.dtype == np.uint8
    assert picture.shape == (180, 1050, 3)
    # Wrong ones are titled in crimson: each title keeps to its own 150 pixels.
    red = (picture[..., 0] > 180) & (picture[..., 1] < 80) & (picture[..., 2] < 110)
    assert [bool(red[:, 150 * place : 150 * (place + 1)].any()) for place in range(7)] == [
        bool(logits.argmax() != label) for logits, label in zip(np.array(PIXELS), LABELS, strict=True)
    ]


def test_a_picture_has_a_few_examples_spread_over_the_split() -> None:
    images = np.random.default_rng(0).integers(0, 256, (100, *IMAGE.dims), dtype=np.uint8)
    many = Split("test", MappedShards([images]), np.arange(100), np.zeros(100, np.int64))
    network = Reading()
    shown: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    picture = predictions(network, many, ("a", "b", "c"), CPU)
    assert network.batches == [EXAMPLES]
    assert picture.shape == (360, 1200, 3)
    for image, row in ((images[0], 0), (images[99], -1)):
        assert torch.equal(shown[0][row], to_float(torch.from_numpy(image)))
