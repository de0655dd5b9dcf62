"""On what a job's workers run: decided from the cluster's resources, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.errors import ServiceError
from pipelines.spec import WorkersSpec


@dataclass(frozen=True)
class Placement:
    """What the workers of a job take.

    Attributes:
        workers: how many.
        gpu: whether each takes a GPU.
        note: why there are fewer workers than the spec asks for, None where there are not.
    """

    workers: int
    gpu: bool
    note: str | None = None

    def __str__(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)} on {'GPUs' if self.gpu else 'CPUs'}"


def exactly(spec: WorkersSpec, workers: int) -> WorkersSpec:
    """The same with so many workers, no more and no fewer."""
    return spec.model_copy(update={"count": workers, "min": None})


def placement_of(spec: WorkersSpec, resources: Mapping[str, float]) -> Placement:
    """Place the workers of a job.

    With device ``auto`` a cluster with GPUs trains on GPUs, with fewer workers where it has fewer of them: the batch
    is global, and what is trained does not depend on the number of workers. With ``min`` the same holds for CPUs.

    Args:
        spec: ``workers`` of the job's spec.
        resources: of the cluster, as Ray counts them.

    Raises:
        ServiceError: the cluster has too few GPUs or CPUs.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    asked, field = spec.fewest, "count" if spec.min is None else "min"
    if spec.device == "gpu" and gpus < asked:
        raise ServiceError(
            f"workers.{field}: {asked} GPUs asked for, the cluster has {gpus}",
            hint=f"set workers.{field} or workers.device, or add GPU nodes",
        )
    if spec.device != "cpu" and gpus >= (1 if spec.min is None else spec.min):
        return _of_those_there(spec.count, gpus, gpu=True)
    if cpus < asked:
        raise ServiceError(
            f"workers.{field}: {asked} CPUs asked for, the cluster has {cpus}",
            hint=f"set workers.{field} to {cpus} or less, or add nodes",
        )
    return _of_those_there(spec.count, cpus, gpu=False)


def _of_those_there(count: int, there: int, *, gpu: bool) -> Placement:
    if there >= count:
        return Placement(count, gpu)
    kind = f"{'GPU' if gpu else 'CPU'}{'s' * (there != 1)}"
    return Placement(there, gpu, note=f"workers.count is {count}, the cluster has {there} {kind}")
