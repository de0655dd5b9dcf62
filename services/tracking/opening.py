"""Open the MLflow run of a job: find or create it, and read what it has logged."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipelines
from pipelines.errors import ServiceError
from pipelines.spec import JobSpec
from services.tracking.connection import connect, mlflow_errors
from services.tracking.entries import LogEntry, Picture, Point

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "monge"
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Kind of experiment that MLflow's UI shows as model training."""
JOB_TAG = "monge.job"
FINGERPRINT_TAG = "monge.fingerprint"
DESCRIBED_TAG = "monge.described"
"""Tag of a run that has all its parameters."""

LONGEST_PARAM = 6_000
"""Maximum length of a parameter or a tag in characters."""

_PARAMS_A_CALL = 100


@dataclass
class Delivered:
    """Entries that earlier attempts of a job have logged; repeated steps are not logged again.

    Attributes:
        images: number of images at the last point of each metric.
        pictures: name and number of images of each picture.
    """

    images: dict[str, int] = field(default_factory=dict)
    pictures: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def of(cls, client: MlflowClient, run_id: str) -> Delivered:
        """Return the entries of a run."""
        found = cls()
        for name in client.get_run(run_id).data.metrics:
            found.images[name] = max(point.step for point in client.get_metric_history(run_id, name))
        for artifact in client.list_artifacts(run_id, "images"):
            if named := re.fullmatch(r"images/(.+)\+step\+(\d+)\+timestamp\+.*\.png", artifact.path):
                found.pictures.add((named[1].replace("~", "/"), int(named[2])))
        return found

    def has(self, entry: LogEntry) -> bool:
        """Return whether the run has an entry."""
        match entry:
            case Point(name, _, images, _):
                return images <= self.images.get(name, -1)
            case Picture(name, _, images, _):
                return (name, images) in self.pictures
        return False


@dataclass(frozen=True)
class Opened:
    """An open run.

    Attributes:
        client: client of the server or store.
        run_id: MLflow's id of the run.
        experiment_id: MLflow's id of the experiment of the run.
        delivered: entries that the run has already.
    """

    client: MlflowClient
    run_id: str
    experiment_id: str
    delivered: Delivered = field(default_factory=Delivered)


def open_run(
    uri: str,
    job: str,
    spec: JobSpec,
    run_id: str | None = None,
    parent: str | None = None,
    name: str | None = None,
) -> Opened:
    """See :meth:`services.tracking.run.Run.open`."""
    client = connect(uri)
    with mlflow_errors(uri, f"open the run of job {job!r}"):
        experiment = _experiment(client)
        run_id = run_id or find(client, experiment, job)
        if run_id is None:
            return Opened(client, _create(client, experiment, job, spec, parent, name), experiment)
        tags = client.get_run(run_id).data.tags
        fingerprint = tags.get(FINGERPRINT_TAG)
        if fingerprint != spec.fingerprint():
            raise ServiceError(
                f"run {run_id} of job {job!r} has fingerprint {fingerprint}, but the spec has {spec.fingerprint()}",
                hint="submit a changed spec as a new job",
            )
        if DESCRIBED_TAG not in tags:  # its creator was interrupted
            _describe(client, run_id, spec)
        client.update_run(run_id, status="RUNNING")
        return Opened(client, run_id, experiment, Delivered.of(client, run_id))


def find(client: MlflowClient, experiment: str, job: str) -> str | None:
    """Return the id of the run of a job; None if there is none yet."""
    runs = client.search_runs([experiment], f"tags.`{JOB_TAG}` = '{job}'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _experiment(client: MlflowClient) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        try:
            return str(client.create_experiment(EXPERIMENT, tags=_KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(EXPERIMENT)  # created by another job
            assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _create(
    client: MlflowClient, experiment: str, job: str, spec: JobSpec, parent: str | None, name: str | None
) -> str:
    tags = {
        JOB_TAG: job,
        FINGERPRINT_TAG: spec.fingerprint(),
        "mlflow.source.name": "monge",
        "mlflow.source.type": "JOB",
    }
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    run_id = str(client.create_run(experiment, run_name=name or spec.name, tags=tags).info.run_id)
    _describe(client, run_id, spec)
    return run_id


def _describe(client: MlflowClient, run_id: str, spec: JobSpec) -> None:
    from mlflow.entities import Param

    params = [Param(name, _shortened(value)) for name, value in _flattened(spec.model_dump(mode="json"))]
    for start in range(0, len(params), _PARAMS_A_CALL):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_CALL])
    client.log_text(run_id, spec.to_yaml(), "spec.yaml")
    client.set_tag(run_id, DESCRIBED_TAG, "yes")


def _flattened(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _shortened(value: str) -> str:
    # spec.yaml holds the whole value.
    return value if len(value) <= LONGEST_PARAM else value[: LONGEST_PARAM - 1] + "…"


def _git_commit() -> str | None:
    folder = Path(pipelines.__file__).parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # an installed package, not a checkout
    return answer.stdout.strip()
