"""Networks that a job uses but does not train."""

from pathlib import Path

import pytest
import torch
from runs import CPU, job
from safetensors.torch import save_file

from pipelines.errors import ModelNotFoundError, SpecError
from pipelines.models.inception import InceptionV3
from pipelines.spec import EvaluationSpec, FeatureSpec, JobSpec, TransportSpec
from services.jobs.paths import with_absolute_paths
from services.tracking.registry import register
from services.training.references import feature_networks, pinned, reference_of
from tests.services.tracking.stores import make_bundle, open_run

NOWHERE = "sqlite:////nowhere/at/all.db"


def judged_by(weights: Path) -> JobSpec:
    evaluation = EvaluationSpec(reference="imagenet-inception-v3", weights=str(weights))
    return job("transport", source="digits").model_copy(update={"evaluation": evaluation})


def test_an_imagenet_network_needs_no_registry(tmp_path: Path) -> None:
    save_file(InceptionV3(1000).state_dict(), tmp_path / "weights.safetensors")
    spec = judged_by(tmp_path / "weights.safetensors")
    assert pinned(spec, NOWHERE, tmp_path / "models") == spec
    reference = reference_of(spec, NOWHERE, tmp_path / "models", CPU)
    assert reference is not None
    assert reference.name == "imagenet-inception-v3"
    nothing = job("transport", source="digits")
    assert pinned(nothing, NOWHERE, tmp_path / "models") == nothing
    assert reference_of(nothing, NOWHERE, tmp_path / "models", CPU) is None


def test_what_is_wrong_with_weights_is_told_before_workers_start(tmp_path: Path) -> None:
    save_file({"fc.bias": torch.zeros(1000)}, tmp_path / "weights.safetensors")
    with pytest.raises(SpecError, match="not the weights of Inception-v3") as raised:
        pinned(judged_by(tmp_path / "weights.safetensors"), NOWHERE, tmp_path / "models")
    assert len(str(raised.value)) < 1000


def test_a_job_that_runs_elsewhere_names_its_weights_absolutely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=r"evaluation.weights: .*/weights.safetensors does not exist"):
        with_absolute_paths(judged_by(Path("weights.safetensors")))
    Path("weights.safetensors").touch()
    spec = with_absolute_paths(judged_by(Path("weights.safetensors")))
    assert spec.evaluation.weights == str(tmp_path / "weights.safetensors")


def test_networks_of_features_are_pinned_and_found(uri: str, tmp_path: Path) -> None:
    run = open_run(uri)
    bundle = make_bundle("reconstruction")
    register(run, bundle.save(tmp_path / "b"), "codes")
    features = [FeatureSpec(), FeatureSpec(network="codes", layer=1), FeatureSpec(network="codes@live")]
    spec = job("feature-transport", source="digits")
    assert isinstance(spec.objective, TransportSpec)
    objective = spec.objective.model_copy(update={"features": tuple(features)})
    spec = pinned(spec.model_copy(update={"objective": objective}), run.uri, tmp_path / "models")
    assert isinstance(spec.objective, TransportSpec)
    assert spec.objective.networks == ("codes/1",)
    register(run, make_bundle("reconstruction", seed=1).save(tmp_path / "other"), "codes")
    found = feature_networks(spec, run.uri, tmp_path / "models", CPU)
    assert found.keys() == {"codes/1"}
    weights = bundle.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found["codes/1"].state_dict().items())
    assert feature_networks(job("gan", source="digits"), NOWHERE, tmp_path, CPU) == {}


def test_a_network_of_features_that_is_not_registered(uri: str, tmp_path: Path) -> None:
    spec = job("feature-transport", source="digits")
    objective = spec.objective.model_copy(update={"features": (FeatureSpec(network="nobody"),)})
    with pytest.raises(ModelNotFoundError, match="no model 'nobody@live' is registered"):
        pinned(spec.model_copy(update={"objective": objective}), uri, tmp_path / "models")
