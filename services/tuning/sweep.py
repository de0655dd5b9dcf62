"""Driver of a sweep: shards the data, runs the grid with Ray Tune, and closes all MLflow runs."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback

from pipelines.errors import ServiceError
from pipelines.spec import JobSpec
from services.cluster import join_cluster
from services.settings import Settings
from services.sharding.dataset import dataset_address, shard_dataset
from services.terminal import OnProgress
from services.tracking.run import Run, find_run, mark_killed
from services.training.config import models_folder
from services.training.references import pinned
from services.tuning.grid import Grid
from services.tuning.summary import Outcome
from services.tuning.trial import TrialConfig, run_trial

GRID_TAG = "monge.grid"

Finish = Callable[[Run, list[Outcome]], None]


def run_sweep(
    grid: Grid,
    metrics: Sequence[str],
    settings: Settings,
    finish: Finish,
    on_shard: OnProgress = lambda done, total: None,
    on_images: OnProgress = lambda done, total: None,
) -> list[Outcome]:
    """Run all trials of a grid on the cluster, as many concurrently as it has processors.

    Each trial trains in one process, whatever ``workers`` in its spec: batches are global, so the result equals that of
    a job up to rounding. No model is registered.

    Args:
        grid: trials of the sweep.
        metrics: names of the metrics whose curves are returned.
        settings: addresses of the services.
        finish: called with the sweep's MLflow run and all outcomes before that run is closed.
        on_shard: called with the number of sharded images and the total.
        on_images: called with the number of images that all trials have seen and the total.

    Returns:
        An outcome for each trial, in the order of the grid, with the error if it failed.

    Raises:
        MongeError: the data is invalid, or a service fails. The error of a trial is in its outcome.
    """
    name = f"{grid.base.name}-sweep-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    uri = settings.address("mlflow_uri")
    join_cluster(settings, logs=False)
    _hush()
    parent = None
    try:
        addresses = [_shard(trial.spec, settings, on_shard) for trial in grid.trials]
        parent = Run.open(uri, name, grid.base, name=name)
        parent.tag(GRID_TAG, ", ".join(grid.fields))
        gpu = _gives_gpus(grid.base)
        configs = [
            TrialConfig.of(
                f"{name}-{index:03d}",
                pinned(trial.spec, uri, models_folder(settings)),
                address,
                settings,
                label=trial.label,
                parent=parent.run_id,
                gpu=gpu,
                curves=tuple(metrics),
            )
            for index, (trial, address) in enumerate(zip(grid.trials, addresses, strict=True))
        ]
        total = sum(trial.spec.train.images for trial in grid.trials)
        outcomes = _run(name, grid, configs, settings.home / "sweeps", lambda done: on_images(done, total))
        finish(parent, outcomes)
        parent.close("FINISHED")
        return outcomes
    except BaseException as error:
        # Leaving the cluster ends the trials, which would otherwise continue to log.
        ray.shutdown()
        if parent is not None:
            _close(uri, name, parent, len(grid.trials), killed=isinstance(error, KeyboardInterrupt | SystemExit))
        raise
    finally:
        ray.shutdown()


def _run(
    name: str, grid: Grid, configs: list[TrialConfig], storage: Path, on_images: Callable[[int], None]
) -> list[Outcome]:
    os.environ |= {
        # Tune's handler would catch Ctrl-C to save a state that is never resumed.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # The newer output cannot be silenced.
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    resources = {"cpu": 1.0, "gpu": float(configs[0].gpu)}
    try:
        results = tune.Tuner(
            tune.with_resources(run_trial, resources),
            param_space={"trial": tune.grid_search([config.carried() for config in configs])},
            # Starting a process and importing torch often takes longer than a trial.
            tune_config=tune.TuneConfig(reuse_actors=True, trial_dirname_creator=lambda trial: str(trial.trial_id)),
            run_config=tune.RunConfig(
                name=name, storage_path=str(storage.absolute()), callbacks=[_Watch(on_images)], verbose=0
            ),
        ).fit()
    finally:
        shutil.rmtree(storage / name, ignore_errors=True)
    outcomes = []
    for index, (trial, config) in enumerate(zip(grid.trials, configs, strict=True)):
        result = results[index]
        told: dict[str, Any] = result.metrics or {}
        problem = told.get("error")
        if problem is None and "metrics" not in told:
            problem = f"its process ended: {str(result.error).strip().splitlines()[-1]}"
            Run.open(config.mlflow_uri, config.job, trial.spec, parent=config.parent, name=config.label).close("FAILED")
        outcomes.append(Outcome(trial, told.get("metrics", {}), told.get("curves", {}), problem))
    return outcomes


class _Watch(Callback):
    """Tune callback that counts the images that the trials have seen."""

    def __init__(self, on_images: Callable[[int], None]) -> None:
        self._on_images = on_images
        self._images: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks, which a console does not support; sweeps never restore them.
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See :class:`ray.tune.Callback`."""
        if "images" in result:
            self._images[trial.trial_id] = result["images"]
            self._on_images(sum(self._images.values()))


def _shard(spec: JobSpec, settings: Settings, on_progress: OnProgress) -> str:
    address = dataset_address(settings.home, spec.data, settings.storage)
    shard_dataset(spec.data, address, settings.home / "cache", on_progress=on_progress)
    return address


def _gives_gpus(spec: JobSpec) -> bool:
    """Return whether each trial uses a GPU.

    Raises:
        ServiceError: the spec requires a GPU, and the cluster has none.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if spec.workers.device == "gpu" and not gpus:
        raise ServiceError("workers.device: GPU requested, the cluster has none", hint="set workers.device to cpu")
    return spec.workers.device != "cpu" and gpus > 0


def _hush() -> None:
    """Silence libraries that would write across the progress bar; Tune needs its loggers' files."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")


def _close(uri: str, name: str, parent: Run, count: int, killed: bool) -> None:
    """Close the runs of an interrupted sweep; errors of MLflow are logged, since the sweep's own error matters more."""
    with contextlib.suppress(ServiceError):
        for index in range(count):
            if run_id := find_run(uri, f"{name}-{index:03d}"):
                mark_killed(uri, run_id)
        parent.close("KILLED" if killed else "FAILED")
