"""The driver of a job: shards the data, starts the workers, sees the job to its end."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, cast

from pipelines.errors import MongeError, ServiceError, TrainingError
from pipelines.spec import JobSpec
from services.cluster import join_cluster
from services.settings import Settings
from services.training.progress import stage_line

CHECKPOINTS_KEPT = 2

log = logging.getLogger(__name__)


def run_job(job: str, spec: JobSpec, settings: Settings) -> dict[str, object]:
    """Run a job from its images to its registered model, on the cluster that this process belongs to.

    Args:
        job: its id; a job that is run again under the same id goes on from its latest checkpoint.
        spec: what to do.
        settings: where everything is.

    Returns:
        ``{"model": name/version, "metrics": {…}}``.

    Raises:
        MongeError: the job failed; its MLflow run is then FAILED, and KILLED where this process was told to stop.
    """
    signal.signal(signal.SIGTERM, _stop)
    uri = settings.address("mlflow_uri")
    try:
        return _run(job, spec, settings, uri)
    except (KeyboardInterrupt, SystemExit):
        _close(uri, job, spec, "KILLED")
        raise
    except MongeError:
        _close(uri, job, spec, "FAILED")
        raise


def _run(job: str, spec: JobSpec, settings: Settings, uri: str) -> dict[str, object]:
    # Ray Train and torch take seconds to import; that happens while the data is sharded.
    importing = threading.Thread(target=_import_training, daemon=True)
    importing.start()
    _say("joining the cluster")
    join_cluster(settings)
    data = _shard(spec, settings)
    _say(f"starting {spec.workers.count} workers")
    importing.join()

    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from services.training.worker import train_worker, worker_config

    # Ray annotates neither functions that return something nor the value that it hands back.
    trainer: Any = TorchTrainer(
        cast(Any, train_worker),
        train_loop_config=worker_config(job, spec, data, uri, settings.plan_deadline),
        scaling_config=ScalingConfig(num_workers=spec.workers.count, use_gpu=_use_gpu(spec)),
        run_config=RunConfig(
            name=job,
            storage_path=str((settings.home / "jobs").absolute()),
            failure_config=FailureConfig(max_failures=spec.workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(
            f"the workers of {job} failed: {_innermost(error)}", cure=f"read `monge logs {job}`"
        ) from error
    outcome = dict(result.return_value or {})
    if "error" in outcome:
        raise TrainingError(str(outcome["error"]), cure=outcome["cure"])
    _say(f"done: {outcome.get('model')}")
    return outcome


def _shard(spec: JobSpec, settings: Settings) -> Path:
    from services.sharding.dataset import dataset_folder, shard_dataset

    folder = dataset_folder(settings.home, spec.data).absolute()
    _say(f"sharding {spec.data.source} into {folder}")
    manifest = shard_dataset(spec.data, folder, settings.home / "cache", on_progress=_shard_progress)
    if manifest.quarantined:
        _say(f"set aside {manifest.quarantined} unreadable images, listed in {folder / 'quarantine.jsonl'}")
    return folder


def _use_gpu(spec: JobSpec) -> bool:
    """Whether the workers take GPUs.

    Raises:
        ServiceError: the spec insists on GPUs, or on more workers than the cluster has processors for.
    """
    import ray

    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), int(total.get("CPU", 0))
    if spec.workers.device == "gpu" and gpus < spec.workers.count:
        raise ServiceError(
            f"workers.count: {spec.workers.count} GPUs asked for, the cluster has {gpus}",
            cure="set workers.count or workers.device, or add GPU nodes",
        )
    use_gpu = spec.workers.device == "gpu" or (spec.workers.device == "auto" and gpus >= spec.workers.count)
    if not use_gpu and cpus < spec.workers.count:
        raise ServiceError(
            f"workers.count: {spec.workers.count} CPUs asked for, the cluster has {cpus}",
            cure=f"set workers.count to {cpus} or less, or add nodes",
        )
    return use_gpu


def _import_training() -> None:
    import services.training.worker  # noqa: F401


def _close(uri: str, job: str, spec: JobSpec, status: str) -> None:
    """Leave no run behind that looks as if it went on; the error that ended the job matters more than this one."""
    from services.tracking.run import Run, find_run, mark_killed

    with contextlib.suppress(ServiceError):
        if status == "FAILED":
            Run.open(uri, job, spec).close("FAILED")
        elif run_id := find_run(uri, job):
            mark_killed(uri, run_id)


def _innermost(error: Exception) -> str:
    """What the worker raised, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        return f"{type(cause).__name__}: {cause}"
    return str(error)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _say(text: str) -> None:
    print(stage_line(text), flush=True)


def _shard_progress(done: int, total: int) -> None:
    _say(f"sharded {done:,}/{total:,} images")
