"""Configuration of the workers of a run, and the function that Ray Train calls on them.

Must not import torch: Ray Train's controller imports this module.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pipelines.spec import JobSpec
from services.settings import Settings


@dataclass(frozen=True)
class WorkerConfig:
    """Configuration that the driver of a job or sweep passes to its workers.

    Attributes:
        job: id of the job, or of the trial.
        spec: resolved spec as JSON data.
        data: folder of the sharded data set, or its S3 address.
        settings: settings of the driver, for another process.
        mlflow_uri: URI of the MLflow server to which rank 0 logs.
        attempt: number of the attempt of the job; 0 for a trial.
        origin: checkpoint of another job to start from, as ``JOB@IMAGES``.
    """

    job: str
    spec: dict[str, Any]
    data: str
    settings: dict[str, Any]
    mlflow_uri: str
    attempt: int = 0
    origin: str | None = None

    @classmethod
    def of(cls, job: str, spec: JobSpec, data: str, settings: Settings, **more: Any) -> Self:
        """Return the configuration for a driver's settings; ``more`` are the origin and fields of a subclass."""
        return cls(
            job=job,
            spec=spec.model_dump(mode="json"),
            data=data,
            settings=settings.for_workers(),
            mlflow_uri=settings.address("mlflow_uri"),
            **more,
        )

    def carried(self) -> dict[str, Any]:
        """Return the configuration as a dictionary for Ray."""
        return asdict(self)

    def settings_here(self) -> Settings:
        """Return the driver's settings for this machine, with a local home folder if storage is in S3."""
        own = set()
        if self.settings.get("storage") and "MONGE_HOME" in os.environ:
            own = {"home", "shard_cache"}
        return Settings(**{name: value for name, value in self.settings.items() if name not in own})


def models_folder(settings: Settings) -> Path:
    """Return the folder of downloaded models."""
    return (settings.home / "models").absolute()


def jobs_address(settings: Settings) -> str:
    """Return the folder or S3 address with one subfolder per job for checkpoints and attempts."""
    return f"{settings.storage}/jobs" if settings.storage else str(_jobs_folder(settings))


def staging_folder(settings: Settings, job: str, attempt: int) -> Path:
    """Return the local folder for checkpoints of an attempt until Ray Train has stored them."""
    return _jobs_folder(settings) / ".staging" / f"{job}.{attempt}"


def _jobs_folder(settings: Settings) -> Path:
    return (settings.home / "jobs").absolute()


def on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """See :func:`services.training.worker.train_worker`."""
    from services.training.worker import train_worker

    return train_worker(config)
