"""The loss of a regression, compared with hand computation."""

import pytest
import torch

from pipelines.data.targets import target
from pipelines.models.classifiers import Perceptron
from pipelines.objectives.phase import Step
from pipelines.objectives.regression import Regression
from pipelines.shape import ImageShape
from pipelines.spec import RegressionSpec

IMAGE = ImageShape(1, 4, 4)


@pytest.mark.parametrize("name", ["waves", "cone"])
def test_it_is_a_share_of_the_mean_squared_error_of_the_global_batch(name: str) -> None:
    torch.manual_seed(0)
    network = Perceptron(IMAGE, 1)
    images = torch.rand(6, *IMAGE.dims) * 2 - 1
    step = Step(0, images, torch.zeros(6, dtype=torch.int64), torch.arange(6), 9, slice(0, 6), 0)
    (phase,) = Regression(RegressionSpec(kind="regression", target=name), network).phases
    loss = phase.loss(step)
    outputs = (images.flatten(1) @ network.weights.flatten() + network.layers[1].bias).tolist()
    expected = sum((a - b) ** 2 for a, b in zip(outputs, target(images, name).tolist(), strict=True)) / 9
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert float(loss.sums["loss"]) == pytest.approx(expected, rel=1e-5)
