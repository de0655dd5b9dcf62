"""Evaluation of generators with the features of a reference classifier."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CPU, job, start, stripes

from pipelines.data.loader import ShardedDataset
from pipelines.errors import SpecError
from pipelines.evaluation.build import Evaluator
from pipelines.evaluation.features import ClassifierFeatures
from pipelines.evaluation.figures import TILE
from pipelines.evaluation.judging import NEIGHBOURS, SHOWN, FeatureJudge
from pipelines.evaluation.scores import frechet_distance
from pipelines.models.build import build_model
from pipelines.models.bundle import Bundle, to_float
from pipelines.models.network import Classifier, Generator
from pipelines.shape import ImageShape
from pipelines.spec import parse_spec
from pipelines.transport.planner import LocalPlanner


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return stripes(tmp_path_factory.mktemp("stripes"))


def extractor(data: ShardedDataset, kind: str = "mlp", image: ImageShape | None = None) -> ClassifierFeatures:
    torch.manual_seed(3)
    spec, image = job(kind).model, image or data.image
    return ClassifierFeatures("judge/1", Bundle(build_model(spec, image, 2).eval(), spec, image, data.classes))


class Replay(Generator):
    """Returns fixed images for any input."""

    def __init__(self, images: torch.Tensor, image: ImageShape) -> None:
        super().__init__(image, 2)
        self.images, self.given = images, 0

    def forward(self, latents: torch.Tensor, conditions: torch.Tensor | None = None) -> torch.Tensor:
        found = self.images[[(self.given + k) % len(self.images) for k in range(len(latents))]]
        return to_float(found)


@pytest.mark.parametrize("kind", ["perceptron", "mlp", "lenet"])
@torch.inference_mode()
def test_features_are_what_the_last_layer_is_given(data: ShardedDataset, kind: str) -> None:
    made = extractor(data, kind)
    network = made.bundle.network
    assert isinstance(network, Classifier)
    images = data.test.take(np.arange(9))[0]
    features, labels = made(images)
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.testing.assert_close(last(features), network(to_float(images)))
    assert torch.equal(labels, network(to_float(images)).argmax(1))
    assert torch.equal(made(images.numpy())[0], features)


def test_real_images_score_as_real_and_one_image_does_not(data: ShardedDataset) -> None:
    made = extractor(data)
    judge = FeatureJudge(made, data.train, data.test, 1000, seed=1)
    held_out = data.test.take(np.arange(len(data.test)))[0]
    same = judge.scores(Replay(held_out, data.image))
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    # Untrained, it sees the held-out images as it sees them; a single one is of one class.
    shares = np.bincount(made(held_out)[1].numpy(), minlength=2) * 2 / len(held_out)
    assert same["smallest_class_share"] == pytest.approx(shares.min())
    one = judge.scores(Replay(held_out[:1], data.image))
    assert one["smallest_class_share"] == 0
    assert one["fid"] > same["fid_real"] > 0
    assert one["recall"] < 0.2
    assert one["kid"] > same["kid"]
    for name in ("fid_real", "fid_gaussian"):
        assert one[name] == same[name]
    train = made(data.train.take(np.arange(len(data.train)))[0])[0]
    assert 0.1 < same["fid_real"] / frechet_distance(made(held_out)[0], train) < 10


def test_a_conditional_generator_is_judged_by_the_classes_that_it_was_asked_for(data: ShardedDataset) -> None:
    made = extractor(data)
    judge = FeatureJudge(made, data.train, data.test, len(data.test), seed=1)
    held_out = data.test.take(np.arange(len(data.test)))[0]
    seen = made(held_out)[1]
    assert "asked_class_share" not in judge.scores(Replay(held_out, data.image))
    told = Replay(held_out, data.image)
    told.conditions = 2
    told.asked = lambda labels: torch.nn.functional.one_hot(labels, 2).float()  # type: ignore[method-assign]
    expected = (seen == torch.arange(len(seen)) % 2).double().mean()
    assert 0 < expected < 1
    assert judge.scores(told)["asked_class_share"] == pytest.approx(float(expected))
    # Two classifiers may number the classes differently.
    other = FeatureJudge(made, data.train, data.test, len(data.test), seed=1, classes=data.classes[::-1])
    assert "asked_class_share" not in other.scores(told)


def test_neighbours_show_the_copy_beside_the_sample(data: ShardedDataset) -> None:
    images = data.train.take(np.arange(12, 12 + SHOWN))[0]
    judge = FeatureJudge(extractor(data), data.train, data.test, 100, seed=1)
    picture = judge.neighbours(Replay(images, data.image))
    side = -(-TILE // 12) * 12 + 1
    assert picture.shape == (SHOWN * side + 1, (NEIGHBOURS + 1) * side + 1)
    for row in range(SHOWN):
        shown, first = (picture[row * side + 1 : (row + 1) * side, k * side + 1 : (k + 1) * side] for k in (0, 1))
        assert np.array_equal(shown, first)


def test_an_evaluation_names_its_extractor(data: ShardedDataset) -> None:
    spec = job("transport")
    _, state = start(spec, data)
    made = extractor(data)
    evaluation = Evaluator(spec, data, LocalPlanner(), CPU, made)(state.judged)
    assert {"test_fid", "test_fid_real", "test_fid_gaussian", "test_kid", "test_coverage"} <= evaluation.metrics.keys()
    assert evaluation.pictures.keys() == {"samples", "neighbours"}
    assert evaluation.tags["feature_extractor"] == f"judge/1 sha256:{made.bundle.digest()[:16]}"


def test_the_hash_is_of_the_saved_weights(data: ShardedDataset, tmp_path: Path) -> None:
    bundle = extractor(data).bundle
    bundle.save(tmp_path)
    assert bundle.digest() in (tmp_path / "model.json").read_text()


def test_a_reference_for_other_images_is_refused(data: ShardedDataset) -> None:
    other = extractor(data, image=ImageShape(3, 12, 12))
    with pytest.raises(SpecError, match=r"judge/1 reads images of \(3, 12, 12\), received ones of \(1, 12, 12\)"):
        Evaluator(job("transport"), data, LocalPlanner(), CPU, other)
    spec = job("transport").model
    generator = Bundle(build_model(spec, data.image, 2), spec, data.image, data.classes)
    with pytest.raises(SpecError, match="judge/1 is a generator"):
        ClassifierFeatures("judge/1", generator)


def test_a_classifier_is_not_judged_by_a_reference() -> None:
    document = job("mlp").model_dump()
    document["evaluation"]["reference"] = "lenet@live"
    with pytest.raises(SpecError, match="'lenet@live' is for generators; this job does not train one"):
        parse_spec(document)


def test_how_it_is_judged_does_not_bind_a_checkpoint() -> None:
    spec = job("transport")
    judged = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"reference": "lenet"})})
    assert judged.fingerprint() == spec.fingerprint()
