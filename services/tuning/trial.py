"""A trial of a sweep: the training loop in a separate process with one thread and a child MLflow run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from ray import tune

from pipelines.errors import MongeError
from pipelines.evaluation.result import Evaluation
from pipelines.spec import JobSpec
from pipelines.training.run import run_training, start_run
from pipelines.training.state import TrainState
from services.tracking.run import Run
from services.training.config import WorkerConfig, models_folder
from services.training.references import feature_networks, reference_of
from services.training.worker import configure_process, open_for, planner_of
from services.tuning.summary import Curve

REPORT_EVERY = 1.0
"""Seconds between progress reports: Tune blocks the trial until it has processed a report."""


@dataclass(frozen=True, kw_only=True)
class TrialConfig(WorkerConfig):
    """Configuration that the driver of a sweep passes to a trial.

    Attributes:
        label: swept values as text.
        parent: id of the sweep's MLflow run.
        gpu: whether the trial uses a GPU.
        curves: names of the metrics whose curves are returned.
    """

    label: str
    parent: str
    gpu: bool
    curves: tuple[str, ...]


def run_trial(config: dict[str, Any]) -> None:
    """Train the spec in ``config["trial"]`` and report metrics, or the error, to Tune.

    Tune's trainable; one process runs several of them in sequence.
    """
    trial = TrialConfig(**config["trial"])
    spec = JobSpec.model_validate(trial.spec)
    configure_process()
    tracked = Run.open(trial.mlflow_uri, trial.job, spec, parent=trial.parent, name=trial.label)
    try:
        listener = _train(trial, spec, tracked)
    except Exception as error:
        told = error.args[0] if isinstance(error, MongeError) else f"{type(error).__name__}: {error}"
        tracked.tag("error", str(told))
        tracked.close("FAILED")
        tune.report({"error": str(told)})
        return
    tracked.close("FINISHED")
    tune.report({"images": spec.train.images, "metrics": listener.latest, "curves": listener.curves})


def _train(trial: TrialConfig, spec: JobSpec, tracked: Run) -> _Listener:
    settings = trial.settings_here()
    device = torch.device("cuda" if trial.gpu else "cpu")
    # Not verified: each trial would read the whole data set.
    data = open_for(spec, trial.data, settings, verify=False)
    planner = planner_of(trial.job, spec, settings.plan_deadline)
    networks = feature_networks(spec, trial.mlflow_uri, models_folder(settings), device)
    objective, state = start_run(spec, data, planner, device, networks=networks)
    reference = reference_of(spec, trial.mlflow_uri, models_folder(settings), device)
    listener = _Listener(tracked, trial.curves)
    run_training(spec, data, objective, state, planner, listener, device, reference)
    return listener


class _Listener:
    """Listener of the training loop; see :class:`pipelines.training.loop.Listener`."""

    def __init__(self, run: Run, curves: tuple[str, ...]) -> None:
        self._run = run
        self._next_report = time.monotonic() + REPORT_EVERY
        self.latest: dict[str, float] = {}
        self.curves: dict[str, Curve] = {name: [] for name in curves}

    def metrics(self, values: dict[str, float], images: int) -> None:
        """Log metrics, and report the number of images to Tune."""
        self.latest |= values
        for name in self.curves.keys() & values.keys():
            self.curves[name].append((images, values[name]))
        self._run.metrics(values, images)
        if time.monotonic() >= self._next_report:
            tune.report({"images": images})
            self._next_report = time.monotonic() + REPORT_EVERY

    def evaluation(self, evaluation: Evaluation, images: int) -> None:
        """Log an evaluation."""
        self.metrics(evaluation.metrics, images)
        self._run.pictures(evaluation, images)

    def checkpoint(self, state: TrainState) -> None:
        """Ignore checkpoints: a failed trial is reported, not resumed."""
