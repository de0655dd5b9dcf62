"""One trial without Tune: logs, reports, and training identical to that of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import go_on, job, start, stripes

from pipelines.data.loader import ShardedDataset
from pipelines.spec import JobSpec, parse_spec
from services.settings import Settings
from services.tracking.connection import connect
from services.tracking.run import Run, find_run
from services.tuning import trial
from services.tuning.trial import TrialConfig, run_trial


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return stripes(tmp_path_factory.mktemp("stripes"))


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the reports to Tune."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(trial.tune, "report", found.append)
    monkeypatch.setattr(trial, "configure_process", lambda: torch.set_num_threads(1))
    return found


def tried(spec: JobSpec, data: ShardedDataset, uri: str) -> str:
    """Run a trial as child of a sweep's run; return the id of the latter."""
    parent = Run.open(uri, "sweep", job("mlp"))
    config = TrialConfig(
        job="sweep-000", label="seed=7", parent=parent.run_id, spec=spec.model_dump(mode="json"),
        data=data.address, settings=Settings(plan_deadline=5).for_workers(), mlflow_uri=uri,
        gpu=False, curves=("loss", "test_error"),
    )  # fmt: skip
    run_trial({"trial": config.carried()})
    parent.close()
    return parent.run_id


def test_a_trial_trains_as_a_job_and_logs_below_its_sweep(
    data: ShardedDataset, uri: str, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "REPORT_EVERY", 0.0)
    spec = job("mlp", log_every=32)
    parent = tried(spec, data, uri)

    *progress, last = reports
    assert [report["images"] for report in progress] == [32, 64, 96, 96]
    assert last["images"] == 96
    points = go_on(spec, data, *start(spec, data)).points
    assert last["curves"]["loss"] == [(images, point["loss"]) for images, point in points]
    assert [images for images, _ in last["curves"]["test_error"]] == [96]
    assert last["metrics"]["test_error"] == last["curves"]["test_error"][0][1]

    run_id = find_run(uri, "sweep-000")
    assert run_id is not None
    run = connect(uri).get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "seed=7")
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.metrics["loss"] == points[-1][1]["loss"]
    pictures = {Path(artifact.path).name for artifact in connect(uri).list_artifacts(run_id, "images")}
    assert any(name.startswith("confusion") for name in pictures)


def test_a_trial_that_fails_says_why(data: ShardedDataset, uri: str, reports: list[dict[str, Any]]) -> None:
    document = job("lenet").model_dump(mode="json")
    document["optimizer"]["learning_rate"] = 1e30
    tried(parse_spec(document), data, uri)

    (report,) = reports
    assert "loss is" in report["error"]
    assert "hint" not in report["error"]
    run_id = find_run(uri, "sweep-000")
    assert run_id is not None
    run = connect(uri).get_run(run_id)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", report["error"])


def test_few_images_are_those_of_the_spec(data: ShardedDataset, uri: str, reports: list[dict[str, Any]]) -> None:
    document = job("mlp", images=1600, batch=4).model_dump(mode="json")
    document["data"]["per_class"] = 1
    document["optimizer"] = {"learning_rate": 0.01}
    document["objective"]["flip"] = False
    tried(parse_spec(document), data, uri)

    assert reports[-1]["metrics"]["train_error"] == 0.0
    assert reports[-1]["metrics"]["test_error"] > 0.1
