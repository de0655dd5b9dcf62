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
    """A store with its tables made, which takes seconds; tests take copies."""
    file = tmp_path_factory.mktemp("store") / "empty.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of one test; artifacts lie beside it."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'store.db')}"


def job_spec(kind: str = "classification", **more: object) -> JobSpec:
    """The spec of a small job."""
    model = {"kind": "mlp", "hidden": [8]} if kind == "classification" else {"kind": "conv-generator", "width": 4}
    return parse_spec(
        {"name": "a-job", "data": {"source": "digits"}, "model": model, "objective": {"kind": kind}}
        | {"train": {"images": 100}}
        | more
    )


def make_bundle(kind: str = "classification", seed: int = 0, channels: int = 1) -> Bundle:
    """A network of random weights for images of 16 × 16."""
    torch.manual_seed(seed)
    spec, image = job_spec(kind).model, ImageShape(channels, 16, 16)
    return Bundle(build_model(spec, image, len(CLASSES)).eval(), spec, image, CLASSES)


def open_run(uri: str, job: str = "job-1") -> Run:
    """The run of a small job."""
    return Run.open(uri, job, job_spec())
