"""What judges a job's generator, when no registry is asked for it."""

from pathlib import Path

import pytest
import torch
from runs import CPU, job
from safetensors.torch import save_file

from pipelines.errors import SpecError
from pipelines.models.inception import InceptionV3
from pipelines.spec import EvaluationSpec, JobSpec
from services.jobs.paths import with_absolute_paths
from services.training.references import pinned, reference_of

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
