"""Metrics and pictures of each kind of network."""

import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CPU, go_on, job, start, stripes

from pipelines.data.loader import ShardedDataset, Split
from pipelines.data.shards import MappedShards
from pipelines.data.targets import target
from pipelines.errors import ShardError
from pipelines.evaluation.build import GRID, Evaluator
from pipelines.evaluation.classification import probabilities, spread
from pipelines.evaluation.figures import TILE, encode_png, image_grid, weights_figure
from pipelines.models.bundle import to_float
from pipelines.transport.planner import LocalPlanner

DISTANCES = {
    "test_transport_cost", "test_transport_cost_gaussian", "test_transport_cost_real",
    "test_transport_points", "test_transport_max_gap",
    "test_sliced_cost", "test_sliced_cost_gaussian", "test_sliced_cost_real", "test_sample_spread",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return stripes(tmp_path_factory.mktemp("stripes"))


@pytest.mark.parametrize("kind", ["mlp", "perceptron", "transport", "flow"])
def test_each_kind_of_network_has_its_evaluation(data: ShardedDataset, kind: str) -> None:
    spec = job(kind)
    _, state = start(spec, data)
    evaluator = Evaluator(spec, data, LocalPlanner(), CPU)
    torch.manual_seed(1)
    first = evaluator(state.judged)
    torch.manual_seed(2)
    again = evaluator(state.judged)
    assert first.metrics == again.metrics
    assert all(math.isfinite(value) for value in first.metrics.values())
    if kind in ("mlp", "perceptron"):
        assert first.metrics.keys() == {
            "test_accuracy", "test_loss", "test_error", "train_error",
            "test_calibration_error", "test_lowest_class_accuracy",
            *(f"test_accuracy_of_{name}" for name in data.classes),
        }  # fmt: skip
        by_class = [first.metrics[f"test_accuracy_of_{name}"] for name in data.classes]
        shares = [float((data.test.labels == label).mean()) for label in range(len(data.classes))]
        assert min(by_class) == first.metrics["test_lowest_class_accuracy"]
        assert np.dot(by_class, shares) == pytest.approx(first.metrics["test_accuracy"])
        weights = {"weights"} if kind == "perceptron" else set()
        assert first.pictures.keys() == {"predictions", "confusion", "calibration", "worst"} | weights
        assert first.metrics["test_error"] == pytest.approx(1 - first.metrics["test_accuracy"])
        assert first.metrics["test_lowest_class_accuracy"] <= first.metrics["test_accuracy"]
        return
    assert first.metrics.keys() == DISTANCES
    assert first.metrics["test_transport_points"] == len(data.test)
    assert first.tags.keys() == {"transport_solver"}
    side = round(GRID**0.5) * (math.ceil(TILE / 12) * 12 + 1) + 1
    assert first.pictures["samples"].shape == (side, side)


def test_errors_are_of_the_split_that_they_name(data: ShardedDataset) -> None:
    spec = job("mlp", images=4000)
    objective, state = start(spec, data)
    go_on(spec, data, objective, state)
    metrics = Evaluator(spec, data, LocalPlanner(), CPU)(state.judged).metrics
    rows, labels = probabilities(state.judged, data.train, CPU)
    assert len(data.test) < len(data.train)
    judged = spread(data.train, len(data.test))
    assert (judged[0], judged[-1], len(judged)) == (0, len(data.train) - 1, len(data.test))
    assert metrics["train_error"] == pytest.approx((rows.argmax(1) != labels)[judged].mean())
    assert metrics["train_error"] < metrics["test_error"]


def test_a_regression_is_judged_by_its_squared_error(data: ShardedDataset) -> None:
    spec = job("regression")
    _, state = start(spec, data)
    state.judged.train()
    found = Evaluator(spec, data, LocalPlanner(), CPU)(state.judged)
    assert state.judged.training
    assert found.pictures.keys() == {"approximation"}
    images = to_float(data.test.take(np.arange(len(data.test)))[0])
    with torch.no_grad():
        errors = (state.judged(images)[:, 0] - target(images, "waves")).square()
    assert found.metrics["test_error"] == pytest.approx(float(errors.mean()), rel=1e-5)
    assert found.metrics.keys() == {"train_error", "test_error"}


def test_weights_are_shown_by_their_sign_and_two_classes_by_their_difference() -> None:
    weights = np.zeros((2, 1, 2, 2), np.float32)
    weights[0, 0, 0, 0], weights[1, 0, 1, 1] = 1.0, 1.0
    picture = weights_figure(weights, ["cat", "dog"]).astype(int)
    red, blue = picture[..., 0] - picture[..., 2] > 50, picture[..., 2] - picture[..., 0] > 50
    rows, columns = np.nonzero(red)
    assert rows.mean() > np.nonzero(blue)[0].mean(), "the weight of dog speaks for dog, below"
    assert columns.mean() > np.nonzero(blue)[1].mean()
    assert weights_figure(np.zeros((7, 3, 4, 4), np.float32), list("abcdefg")).shape[2] == 3


def test_a_data_set_without_held_out_images_is_refused(data: ShardedDataset) -> None:
    empty = dataclasses.replace(
        data, test=Split("test", MappedShards([]), np.empty(0, np.int64), np.empty(0, np.int64))
    )
    with pytest.raises(ShardError, match="the test split is empty"):
        Evaluator(job("mlp"), empty, LocalPlanner(), CPU)


def test_a_network_of_no_known_kind_is_refused(data: ShardedDataset) -> None:
    with pytest.raises(TypeError, match="no evaluation is known for a Linear"):
        Evaluator(job("mlp"), data, LocalPlanner(), CPU)(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(1, None, (6, 7)), (4, None, (11, 13)), (5, None, (11, 19)), (5, 2, (16, 13)), (3, 3, (6, 19))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_shape_of_a_grid(count: int, columns: int | None, shape: tuple[int, int], channels: int) -> None:
    grid = image_grid(np.zeros((count, channels, 4, 5), np.uint8), columns)
    assert grid.dtype == np.uint8
    assert grid.shape == (shape if channels == 1 else (*shape, 3))


def test_a_grid_shows_its_images_row_by_row_and_leaves_the_rest_white() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 2, 2), dtype=np.uint8)
    grid = image_grid(images, columns=3)
    for place, image in enumerate(images):
        top, left = 1 + place // 3 * 3, 1 + place % 3 * 3
        assert np.array_equal(grid[top : top + 2, left : left + 2], image.transpose(1, 2, 0))
    assert (grid[4:, 7:] == 255).all()
    assert (grid[0] == 255).all()
    assert (grid[:, 3] == 255).all()


@pytest.mark.parametrize(("tile", "factor"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_small_images_are_enlarged_by_a_whole_factor(tile: int, factor: int) -> None:
    images = np.random.default_rng(0).integers(0, 255, (1, 1, 2, 3), dtype=np.uint8)
    grid = image_grid(images, border=0, tile=tile)
    assert np.array_equal(grid, np.kron(images[0, 0], np.ones((factor, factor), np.uint8)))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_keeps_every_pixel(shape: tuple[int, ...], tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)))), picture)
