"""What the driver of a run tells its workers, and the function that Ray Train calls there.

Nothing here imports torch: Ray Train's controller has to know this module, and only the workers need the rest.
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
    """What the driver of a job, or of a sweep, tells its workers.

    Attributes:
        job: id of the job, or of the trial.
        spec: the resolved spec, as JSON holds it.
        data: folder of the sharded data set, or its address in S3.
        settings: of the driver, for a process elsewhere.
        mlflow_uri: where rank 0 logs.
        attempt: number of the attempt at the job; 0 for a trial, which has none.
        origin: the job whose checkpoint this one starts with, as ``JOB@IMAGES``.
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
        """The configuration by a driver's settings; ``more`` are the origin and the fields of a subclass."""
        return cls(
            job=job,
            spec=spec.model_dump(mode="json"),
            data=data,
            settings=settings.for_workers(),
            mlflow_uri=settings.address("mlflow_uri"),
            **more,
        )

    def carried(self) -> dict[str, Any]:
        """As Ray carries it."""
        return asdict(self)

    def settings_here(self) -> Settings:
        """The driver's settings as they hold on this machine, whose home folder is its own where storage is in S3."""
        own = set()
        if self.settings.get("storage") and "MONGE_HOME" in os.environ:
            own = {"home", "shard_cache"}
        return Settings(**{name: value for name, value in self.settings.items() if name not in own})


def models_folder(settings: Settings) -> Path:
    """Where downloaded models lie."""
    return (settings.home / "models").absolute()


def jobs_address(settings: Settings) -> str:
    """Where checkpoints and attempts of all jobs lie, each job's below its id: a folder, or an address in S3."""
    return f"{settings.storage}/jobs" if settings.storage else str(_jobs_folder(settings))


def staging_folder(settings: Settings, job: str, attempt: int) -> Path:
    """Where checkpoints of an attempt lie on the worker's machine until Ray Train has taken them."""
    return _jobs_folder(settings) / ".staging" / f"{job}.{attempt}"


def _jobs_folder(settings: Settings) -> Path:
    return (settings.home / "jobs").absolute()


def on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """See :func:`services.training.worker.train_worker`."""
    from services.training.worker import train_worker

    return train_worker(config)
