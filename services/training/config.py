"""What the driver of a run tells its workers, and the function that Ray Train calls there.

Nothing here imports torch: Ray Train's controller has to know this module, and only the workers need the rest.
"""

from __future__ import annotations

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
        models: folder of downloaded models.
        attempt: number of the attempt at the job; 0 for a trial, which has none.
        origin: the job whose checkpoint this one starts with, as ``JOB@IMAGES``.
    """

    job: str
    spec: dict[str, Any]
    data: str
    settings: dict[str, Any]
    mlflow_uri: str
    models: str
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
            models=str(models_folder(settings)),
            **more,
        )

    def carried(self) -> dict[str, Any]:
        """As Ray carries it."""
        return asdict(self)


def models_folder(settings: Settings) -> Path:
    """Where downloaded models lie."""
    return (settings.home / "models").absolute()


def jobs_folder(settings: Settings) -> Path:
    """Where the checkpoints of all jobs lie, each job's in a folder of its id."""
    return (settings.home / "jobs").absolute()


def staging_folder(settings: Settings, job: str) -> Path:
    """Where checkpoints of a job lie until Ray Train has taken them."""
    return jobs_folder(settings) / ".staging" / job


def on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """See :func:`services.training.worker.train_worker`."""
    from services.training.worker import train_worker

    return train_worker(config)
