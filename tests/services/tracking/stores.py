"""An MLflow store in a file, and small bundles to register in it."""

import shutil
from pathlib import Path

import pytest
import torch

from pipelines.models.build import build_model
from pipelines.models.bundle import Bundle
from pipelines.shape import ImageShape
from pipelines.spec import JobSpec, parse_spec
from services.tracking.connection import connect
from services.tracking.run import Run

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a store with its tables, which takes seconds; tests use copies."""
    file = tmp_path_factory.mktemp("store") / "empty.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Create a store for one test, with artifacts in the same folder."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'store.db')}"


def job_spec(kind: str = "classification", **more: object) -> JobSpec:
    """Create the spec of a small job."""
    model = {
        "classification": {"kind": "mlp", "hidden": [8]},
        "transport": {"kind": "conv-generator", "width": 4},
        "flow": {"kind": "flow-unet", "width": 8, "steps": 2, "conditional": True},
        "unconditional flow": {"kind": "flow-unet", "width": 8, "steps": 2},
        "gan": {"kind": "biggan", "width": 4},
        "reconstruction": {"kind": "autoencoder", "width": 4, "code": 5},
    }[kind]
    return parse_spec(
        {"name": "a-job", "data": {"source": "digits"}, "model": model, "objective": {"kind": kind.split()[-1]}}
        | {"train": {"images": 100}}
        | more
    )


def make_bundle(kind: str = "classification", seed: int = 0, channels: int = 1) -> Bundle:
    """Create a bundle with random weights for images of 16 × 16.

    The weights do not come from torch's default generator: an endpoint that loads a model in another thread uses it.
    """
    spec, image = job_spec(kind).model, ImageShape(channels, 16, 16)
    network, source = build_model(spec, image, len(CLASSES)).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in network.parameters():
            fan_in = max(weights[0].numel(), 1)
            weights.copy_(torch.randn(weights.shape, generator=source) / fan_in**0.5)
    return Bundle(network, spec, image, CLASSES)


def open_run(uri: str, job: str = "job-1") -> Run:
    """Open the run of a small job."""
    return Run.open(uri, job, job_spec())
