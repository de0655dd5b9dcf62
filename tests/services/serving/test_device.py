"""The device of an endpoint's networks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.errors import ServiceError
from pipelines.models.build import build_model
from pipelines.models.bundle import Bundle
from pipelines.shape import ImageShape
from pipelines.spec import PerceptronSpec
from services.serving import models
from services.serving.app import create_app
from services.serving.metrics import EndpointMetrics
from services.serving.models import LoadedModel, ModelStore, device_of
from services.settings import Settings
from services.tracking.registry import ModelRef


@pytest.mark.parametrize(
    ("asked", "found", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_a_gpu_is_taken_where_there_is_one(
    asked: Any, found: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert device_of(asked) == torch.device(device)


def test_a_gpu_that_is_absent_is_an_error_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = Settings(home=tmp_path, mlflow_uri="http://127.0.0.1:1", serving_device="cuda")
    with pytest.raises(ServiceError, match="MONGE_SERVING_DEVICE: cuda requested"):
        create_app(settings)


def test_networks_are_put_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, image = PerceptronSpec(kind="perceptron"), ImageShape(1, 2, 2)
    bundle = Bundle(build_model(spec, image, 2).eval(), spec, image, ("a", "b"))
    ref = ModelRef("model", 1, None, "run")
    monkeypatch.setattr(models, "resolve", lambda uri, model: ref)
    monkeypatch.setattr(models, "download", lambda uri, ref, cache: bundle)
    # Nothing runs on the device of this test.
    monkeypatch.setattr(LoadedModel, "warm_up", lambda self: None)
    store = ModelStore("", tmp_path, 1, EndpointMetrics(), torch.device("meta"))
    found = store.load("model/1").bundle.network.parameters()
    assert {weights.device.type for weights in found} == {"meta"}
