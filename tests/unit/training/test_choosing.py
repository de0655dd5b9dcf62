"""With a validation split, the test split is used only once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CPU, Recorder, job, shard, start, stripes

from pipelines.data.loader import Loader, ShardedDataset, Split
from pipelines.data.shards import MappedShards
from pipelines.errors import ShardError
from pipelines.evaluation.result import Evaluation
from pipelines.spec import DataSpec
from pipelines.training.choosing import evaluation_of
from pipelines.training.loop import train
from pipelines.transport.planner import LocalPlanner


@pytest.fixture(scope="module")
def split_in_three(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    folder = tmp_path_factory.mktemp("three")
    stripes(folder / "two")
    source = str(folder / "two" / "images.npz")
    return shard(DataSpec(source=source, test_fraction=1 / 3, validation_fraction=0.25), folder)


class Watching(Recorder):
    """Records the evaluations."""

    def evaluation(self, evaluation: Evaluation, images: int) -> None:
        super().evaluation(evaluation, images)
        self.found = [*getattr(self, "found", []), evaluation]


@pytest.mark.parametrize("kind", ["mlp", "transport"])
def test_the_test_split_is_looked_at_once(
    split_in_three: ShardedDataset, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    taken: list[str] = []
    take = Split.take
    monkeypatch.setattr(Split, "take", lambda split, i: (taken.append(split.name), take(split, i))[1])
    spec = job(kind, images=64, batch=16, evaluate_every=16)
    objective, state = start(spec, split_in_three)
    watching = Watching()
    evaluate = evaluation_of(spec, split_in_three, state, LocalPlanner(), CPU)

    def watched(network: torch.nn.Module) -> Evaluation:
        assert "test" not in taken
        found = evaluate(network)
        assert ("test" in taken) == (state.images >= spec.train.images)
        return found

    with Loader(split_in_three.train, spec.train.batch, spec.seed) as batches:
        train(spec, objective, state, batches, watched, watching, CPU)
    *during, last = watching.found
    assert len(during) == 3
    score = "accuracy" if kind == "mlp" else "transport_cost"
    for evaluation in during:
        assert f"validation_{score}" in evaluation.metrics
        assert not [name for name in evaluation.metrics if name.startswith("test_")]
    assert {f"validation_{score}", f"test_{score}"} <= last.metrics.keys()
    assert {name.removeprefix("test_") for name in last.metrics if name.startswith("test_")} == {
        name.removeprefix("validation_") for name in last.metrics if name.startswith("validation_")
    }


def test_without_a_validation_split_every_evaluation_is_of_the_test_split(tmp_path: Path) -> None:
    data = stripes(tmp_path)
    assert data.validation is None
    with pytest.raises(ShardError, match="no validation split"):
        data.split("validation")
    spec = job("mlp")
    _, state = start(spec, data)
    found = evaluation_of(spec, data, state, LocalPlanner(), CPU)(state.judged)
    assert "test_accuracy" in found.metrics
    assert not [name for name in found.metrics if name.startswith("validation")]


def test_an_empty_test_split_is_told_before_training(split_in_three: ShardedDataset) -> None:
    empty = dataclasses.replace(
        split_in_three, test=Split("test", MappedShards([]), np.empty(0, np.int64), np.empty(0, np.int64))
    )
    spec = job("mlp")
    with pytest.raises(ShardError, match="the test split is empty"):
        evaluation_of(spec, empty, start(spec, split_in_three)[1], LocalPlanner(), CPU)


def test_three_splits_share_the_images(split_in_three: ShardedDataset, tmp_path: Path) -> None:
    validation = split_in_three.validation
    assert validation is not None
    assert [len(split) for split in (split_in_three.train, split_in_three.test, validation)] == [30, 20, 10]
    assert split_in_three.manifest.counts["validation"] == dict.fromkeys(split_in_three.classes, 5)
    everything = [
        image.numpy().tobytes()
        for split in (split_in_three.train, split_in_three.test, validation)
        for image in split.take(np.arange(len(split)))[0]
    ]
    assert len(set(everything)) == 60
    # The test split is the one that there is without a validation split.
    test = stripes(tmp_path).test
    assert torch.equal(test.take(np.arange(20))[0], split_in_three.test.take(np.arange(20))[0])
