"""Metrics of a classifier other than accuracy."""

import numpy as np
import pytest
import torch
from runs import CPU, job, start, stripes

from pipelines.evaluation.classification import calibration, confusion, probabilities, worst
from pipelines.evaluation.figures import calibration_figure, confusion_figure
from pipelines.models.bundle import to_float
from pipelines.models.network import Classifier


def drawn(count: int = 400, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    rows = random.dirichlet(np.ones(classes) * 0.5, count).astype(np.float32)
    return rows, random.integers(0, classes, count)


def test_calibration_by_hand() -> None:
    rows, labels = drawn()
    error, table = calibration(rows, labels, bins=5)
    expected = 0.0
    for place in range(5):
        inside = [i for i, row in enumerate(rows) if place / 5 <= row.max() < (place + 1) / 5]
        if not inside:
            assert table[place].tolist() == [0, 0, 0]
            continue
        confidence = np.mean([float(rows[i].max()) for i in inside])
        accuracy = np.mean([rows[i].argmax() == labels[i] for i in inside])
        assert table[place] == pytest.approx([confidence, accuracy, len(inside) / 400])
        expected += abs(accuracy - confidence) * len(inside) / 400
    assert error == pytest.approx(expected)


def test_a_classifier_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    rows = np.tile(np.array([[0.75, 0.25]], np.float32), (400, 1))
    labels = np.array([0, 0, 0, 1] * 100)
    assert calibration(rows, labels)[0] == pytest.approx(0)
    sure = np.tile(np.array([[1.0, 0.0]], np.float32), (400, 1))
    assert calibration(sure, labels)[0] == pytest.approx(0.25)


def test_confusion_counts_pairs() -> None:
    rows, labels = drawn()
    counts = confusion(rows, labels)
    for true in range(4):
        for predicted in range(4):
            pairs = sum((labels == true) & (rows.argmax(1) == predicted))
            assert counts[true, predicted] == pairs
    assert confusion(rows[:1], labels[:1]).shape == (4, 4)


def test_the_worst_come_first() -> None:
    rows = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]], np.float32)
    assert worst(rows, np.array([1, 1, 0]), 2).tolist() == [0, 2]


def test_probabilities_of_a_whole_split(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = stripes(tmp_path)
    network = start(job("mlp"), data)[1].judged
    assert isinstance(network, Classifier)
    rows, labels = probabilities(network, data.test, CPU, batch=7)
    images, expected = data.test.take(np.arange(len(data.test)))
    with torch.inference_mode():
        np.testing.assert_allclose(rows, network.eval()(to_float(images)).softmax(1), atol=1e-6)
    assert labels.tolist() == expected.tolist()


def test_pictures_are_in_colour_and_of_any_number_of_classes() -> None:
    rows, labels = drawn()
    error, table = calibration(rows, labels)
    pictures = [calibration_figure(table, error), confusion_figure(confusion(rows, labels), list("abcd"))]
    pictures.append(confusion_figure(np.eye(100, dtype=np.int64), [str(k) for k in range(100)]))
    for picture in pictures:
        assert picture.ndim == 3
        assert picture.dtype == np.uint8
        assert picture.std() > 5
