"""The Ray Train run of a job: workers on CPUs or GPUs, restarted from the latest checkpoint when one fails."""

from __future__ import annotations

import shutil
from typing import Any, cast

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines.errors import ServiceError, TrainingError
from pipelines.spec import JobSpec
from services.settings import Settings
from services.training.references import pinned
from services.training.worker import train_worker, worker_config

CHECKPOINTS_KEPT = 2


def fit(job: str, spec: JobSpec, data: str, settings: Settings) -> dict[str, Any]:
    """Train on the cluster that this process has joined.

    Args:
        job: id of the job; with checkpoints of an earlier start of it, training goes on from the latest.
        spec: what to do.
        data: folder of the sharded data set, which every worker can read, or its address in S3.
        settings: where everything is.

    Returns:
        ``{"model": name/version, "metrics": {…}}``; the model is None where the job registers none.

    Raises:
        TrainingError: training failed, or its workers failed more often than the spec allows.
        ServiceError: the cluster has too few processors, or MLflow cannot be reached.
        ModelNotFoundError: there is no such reference to judge by.
        SourceError, SpecError: an ImageNet network to judge by cannot be had.
    """
    storage = (settings.home / "jobs").absolute()
    staging = storage / ".staging" / job
    uri = settings.address("mlflow_uri")
    models = (settings.home / "models").absolute()
    spec = pinned(spec, uri, models)
    use_gpu = _use_gpu(spec)
    # Ray annotates neither functions that return something nor the value that it hands back.
    trainer: Any = TorchTrainer(
        cast(Any, train_worker),
        train_loop_config=worker_config(job, spec, data, settings, staging, models),
        # Most of what passes between ranks lies on their devices, sizes and metrics on their CPUs.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=spec.workers.count, use_gpu=use_gpu),
        run_config=RunConfig(
            name=job,
            storage_path=str(storage),
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
    finally:
        # Workers that were killed leave behind what Ray Train had not taken yet.
        shutil.rmtree(staging, ignore_errors=True)
    outcome = dict(result.return_value or {})
    if "error" in outcome:
        raise TrainingError(str(outcome["error"]), cure=outcome["cure"])
    return outcome


def _use_gpu(spec: JobSpec) -> bool:
    """Whether the workers take GPUs.

    Raises:
        ServiceError: the spec insists on GPUs, or on more workers than the cluster has processors for.
    """
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


def _innermost(error: Exception) -> str:
    """What the worker raised, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        return f"{type(cause).__name__}: {cause}"
    return str(error)
