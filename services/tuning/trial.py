"""One run of a sweep: the training loop in a process of its own, one thread, one MLflow run below the sweep's."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from ray import tune

from pipelines.data.loader import Loader
from pipelines.errors import MongeError
from pipelines.evaluation.result import Evaluation
from pipelines.spec import JobSpec
from pipelines.training.choosing import evaluation_of
from pipelines.training.loop import train
from pipelines.training.state import TrainState
from services.settings import Settings
from services.storage.datasets import open_data
from services.tracking.run import Run
from services.training.references import reference_of
from services.training.worker import configure_process, planner_of, started
from services.tuning.summary import Curve

REPORT_EVERY = 1.0
"""Seconds between two reports of progress: Tune lets the trial wait until it has taken one."""


@dataclass(frozen=True)
class TrialConfig:
    """What the driver of a sweep tells a trial.

    Attributes:
        job: id of the trial.
        label: the values that make it this one.
        parent: id of the sweep's MLflow run.
        spec: the resolved spec, as JSON holds it.
        data: folder of the sharded data set, or its address in S3.
        settings: of the process that drives the sweep, for S3 and the cache of shards.
        mlflow_uri: where it logs.
        plan_deadline: seconds to wait for a plan.
        models: folder of downloaded models.
        gpu: whether it has one.
        curves: names of the curves that are wanted whole.
    """

    job: str
    label: str
    parent: str
    spec: dict[str, Any]
    data: str
    settings: dict[str, Any]
    mlflow_uri: str
    plan_deadline: float
    models: str
    gpu: bool
    curves: tuple[str, ...]

    def space(self) -> dict[str, Any]:
        """As Tune carries it."""
        return asdict(self)


def run_trial(config: dict[str, Any]) -> None:
    """Train as the spec under ``config["trial"]`` says, and report metrics, or the error, to Tune.

    Tune's trainable; it calls many of them in one process, one after the other.
    """
    settings = TrialConfig(**config["trial"])
    spec = JobSpec.model_validate(settings.spec)
    configure_process()
    run = Run.open(settings.mlflow_uri, settings.job, spec, parent=settings.parent, name=settings.label)
    try:
        listener = _train(settings, spec, run)
    except Exception as error:
        told = error.args[0] if isinstance(error, MongeError) else f"{type(error).__name__}: {error}"
        run.tag("error", str(told))
        run.close("FAILED")
        tune.report({"error": str(told)})
        return
    run.close("FINISHED")
    tune.report({"images": spec.train.images, "metrics": listener.latest, "curves": listener.curves})


def _train(settings: TrialConfig, spec: JobSpec, run: Run) -> _Listener:
    device = torch.device("cuda" if settings.gpu else "cpu")
    data = open_data(settings.data, Settings(**settings.settings), verify=False).limited(spec.data.per_class)
    planner = planner_of(settings.job, spec, 0, 1, settings.plan_deadline)
    objective, state = started(spec, data, planner, device)
    reference = reference_of(spec, settings.mlflow_uri, settings.models, device)
    evaluator = evaluation_of(spec, data, state, planner, device, reference)
    listener = _Listener(run, settings.curves)
    with Loader(data.train, spec.train.batch, spec.seed) as batches:
        train(spec, objective, state, batches, evaluator, listener, device)
    return listener


class _Listener:
    """Hears of the run; see :class:`pipelines.training.loop.Listener`."""

    def __init__(self, run: Run, curves: tuple[str, ...]) -> None:
        self._run = run
        self._next_report = time.monotonic() + REPORT_EVERY
        self.latest: dict[str, float] = {}
        self.curves: dict[str, Curve] = {name: [] for name in curves}

    def metrics(self, values: dict[str, float], images: int) -> None:
        """Log a point of the curves, and tell Tune how far the run is."""
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
        """Nothing is kept: a trial that fails is reported, not resumed."""
