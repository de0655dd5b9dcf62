"""Warnings about the training of a generator."""

import pytest
import torch
from runs import CPU, job, start, stripes

from pipelines.data.loader import ShardedDataset
from pipelines.evaluation.build import Evaluator
from pipelines.models.network import Generator
from pipelines.shape import ImageShape
from pipelines.training.health import ailments
from pipelines.transport.planner import LocalPlanner

HEALTHY = {
    "critic_accuracy": 0.8,
    "within_real": 0.3,
    "generator_loss": 0.0,
    "test_sample_spread": 0.9,
    "test_coverage": 0.5,
    "test_coverage_real": 0.95,
    "test_smallest_class_share": 0.7,
    "test_smallest_class_share_real": 0.9,
}


@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        ("critic_accuracy", 0.998, "saturation", "the critic is right on 99.8% of images and samples"),
        ("within_real", 0.001, "saturation", "all images to one point: their cost among themselves is 0.001"),
        ("test_sample_spread", 0.01, "collapse", "samples vary 1.0% as much as images"),
        ("test_coverage", 0.1, "collapse", "samples come near 10.0% of the images, real ones near 95.0%"),
        (
            "test_smallest_class_share",
            0.0,
            "collapse",
            "the rarest class appears at 0.0% of the uniform frequency, in real images at 90.0%",
        ),
    ],
)
def test_each_ailment_is_told_by_its_curve(name: str, value: float, kind: str, text: str) -> None:
    assert ailments(HEALTHY) == {}
    found = ailments(HEALTHY | {name: value})
    assert found.keys() == {kind}
    assert text in found[kind]


def test_a_class_that_is_rare_among_images_may_be_rare_among_samples() -> None:
    assert ailments({"test_smallest_class_share": 0.1, "test_smallest_class_share_real": 0.12}) == {}


def test_both_splits_say_one_thing_once() -> None:
    found = ailments({"validation_sample_spread": 0.01, "test_sample_spread": 0.01, "critic_accuracy": 1.0})
    assert found["collapse"].count("samples vary") == 1
    assert found.keys() == {"collapse", "saturation"}


class OneImage(Generator):
    def __init__(self, image: ImageShape) -> None:
        super().__init__(image, 2)

    def forward(self, latents: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros(len(latents), *self.image.dims)


def test_a_generator_of_one_image_has_collapsed(tmp_path_factory: pytest.TempPathFactory) -> None:
    data: ShardedDataset = stripes(tmp_path_factory.mktemp("health"))
    spec = job("transport")
    evaluate = Evaluator(spec, data, LocalPlanner(), CPU)
    metrics = evaluate(OneImage(data.image)).metrics
    assert metrics["test_sample_spread"] == 0
    assert "collapse" in ailments(metrics)
    assert evaluate(start(spec, data)[1].judged).metrics["test_sample_spread"] > 0
