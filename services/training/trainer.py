"""Training of a job on Ray Train: workers on CPUs or GPUs, restarted from the latest checkpoint after a failure."""

from __future__ import annotations

import math
import shutil
from typing import Any, cast

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines.errors import MongeError, ServiceError, TrainingError
from pipelines.spec import JobSpec
from services.settings import Settings
from services.storage.arrow import open_files, s3_errors
from services.training.backend import NodeTorchConfig
from services.training.config import WorkerConfig, jobs_address, models_folder, on_worker, staging_folder
from services.training.origin import Origin
from services.training.placement import Placement
from services.training.references import pinned
from services.training.snapshot import mend
from services.training.supervision import Supervision, cause_of, causes_of, is_loss, reasons

CHECKPOINTS_KEPT = 2

UNNEEDED = frozenset({"DatasetsCallback", "PlacementGroupCleanerCallback"})
"""Callbacks of Ray Train that are not needed and start a process each (1.5 s of CPU time): the data is not from Ray
Data, and the placement group of the workers ends with the driver."""


class _Trainer(TorchTrainer):
    """Ray Train's trainer without unneeded callbacks, and with supervision of the workers."""

    def _create_default_callbacks(self) -> list[Any]:
        # Not public: if a version of Ray renames it, all callbacks stay active.
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # Ray's annotations know another class
        needed = [one for one in callbacks if type(one).__name__ not in UNNEEDED]
        failures = self.run_config.failure_config
        return [*needed, Supervision(failures.max_failures if failures else 0)]


def fit(
    job: str,
    spec: JobSpec,
    data: str,
    settings: Settings,
    placement: Placement,
    attempt: int = 0,
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Train on the cluster that this process has joined.

    Args:
        job: id of the job; if it has checkpoints, training resumes from the latest.
        spec: spec of the job.
        data: folder of the sharded data set, readable by all workers, or its S3 address.
        settings: addresses of the services.
        placement: workers and devices.
        attempt: number of the attempt of the job.
        origin: checkpoint of another job to start from if the job has none.

    Returns:
        ``{"model": name/version, "metrics": {…}}``; the model is None if the job registers none. Or ``{"stopped":
        images, "saved": …}`` if the workers were asked to stop; ``saved`` tells whether there is a checkpoint at that
        number of images.

    Raises:
        TrainingError: training failed, or the workers raised errors more often than the spec allows.
        StorageError: the keys for S3 are missing.
        ServiceError: the cluster is too small, workers were lost more often than the spec allows or failed to start, or
            MLflow is unreachable.
        ModelNotFoundError: the reference for the evaluation is not registered.
        SourceError, SpecError: an ImageNet network for the evaluation is not available.
    """
    spec = pinned(spec, settings.address("mlflow_uri"), models_folder(settings))
    filesystem, path = open_files(jobs_address(settings), settings)
    began = None if origin is None else str(origin)
    config = WorkerConfig.of(job, spec, data, settings, attempt=attempt, origin=began)
    # Ray annotates neither functions with a result nor the returned value.
    trainer: Any = _Trainer(
        cast(Any, on_worker),
        train_loop_config=config.carried(),
        # Tensors are exchanged between devices, sizes and metrics between CPUs.
        torch_config=NodeTorchConfig(
            backend="cpu:gloo,cuda:nccl" if placement.gpu else "gloo", timeout_s=math.ceil(settings.rank_deadline)
        ),
        scaling_config=ScalingConfig(num_workers=placement.workers, use_gpu=placement.gpu),
        run_config=RunConfig(
            name=job,
            storage_path=path,
            storage_filesystem=filesystem if settings.storage else None,
            failure_config=FailureConfig(max_failures=spec.workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        ),
    )
    try:
        with s3_errors(settings, "written"):
            mend(filesystem, f"{path}/{job}")
            result = trainer.fit()
    except TrainingFailedError as error:
        raise _failure(job, error) from error
    finally:
        # Killed workers on this machine leave checkpoints behind that Ray Train has not stored.
        shutil.rmtree(staging_folder(settings, job, attempt), ignore_errors=True)
    outcome = dict(result.return_value or {})
    if "error" in outcome:
        raise TrainingError(str(outcome["error"]), hint=outcome["hint"])
    return outcome


def _failure(job: str, error: TrainingFailedError) -> MongeError:
    """Return the error of a worker without Ray's wrappers."""
    first = next(iter(causes_of(error).values()), cause_of(error))
    why = "; ".join(reasons(error))
    if is_loss(error):
        return first if isinstance(first, ServiceError) else ServiceError(f"the workers were lost: {why}")
    hint = getattr(first, "hint", None) or f"read `monge logs {job}`"
    return TrainingError(f"the workers of {job} failed: {why}", hint=hint)
