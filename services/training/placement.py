"""Placement of a job's workers, chosen from the resources of the cluster before any data is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.errors import ServiceError
from pipelines.spec import WorkersSpec


@dataclass(frozen=True)
class Placement:
    """Workers of a job and their devices.

    Attributes:
        workers: number of workers.
        gpu: whether each worker uses a GPU.
        note: reason for fewer workers than the spec requests; None otherwise.
    """

    workers: int
    gpu: bool
    note: str | None = None

    def __str__(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)} on {'GPUs' if self.gpu else 'CPUs'}"


def exactly(spec: WorkersSpec, workers: int) -> WorkersSpec:
    """Return the spec with exactly this number of workers."""
    return spec.model_copy(update={"count": workers, "min": None})


def placement_of(spec: WorkersSpec, resources: Mapping[str, float]) -> Placement:
    """Return the placement of the workers of a job.

    With device ``auto``, training uses GPUs if the cluster has any, with fewer workers if it has fewer GPUs than
    requested: the batch is global, and the result does not depend on the number of workers. With ``min``, the same
    holds for CPUs.

    Args:
        spec: ``workers`` of the job's spec.
        resources: resources of the cluster, under the names that Ray uses.

    Raises:
        ServiceError: the cluster has too few GPUs or CPUs.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    asked, field = spec.fewest, "count" if spec.min is None else "min"
    if spec.device == "gpu" and gpus < asked:
        raise ServiceError(
            f"workers.{field}: {asked} GPUs requested, the cluster has {gpus}",
            hint=f"set workers.{field} or workers.device, or add GPU nodes",
        )
    if spec.device != "cpu" and gpus >= (1 if spec.min is None else spec.min):
        return _of_those_there(spec.count, gpus, gpu=True)
    if cpus < asked:
        raise ServiceError(
            f"workers.{field}: {asked} CPUs requested, the cluster has {cpus}",
            hint=f"set workers.{field} to {cpus} or less, or add nodes",
        )
    return _of_those_there(spec.count, cpus, gpu=False)


def _of_those_there(count: int, there: int, *, gpu: bool) -> Placement:
    if there >= count:
        return Placement(count, gpu)
    kind = f"{'GPU' if gpu else 'CPU'}{'s' * (there != 1)}"
    return Placement(there, gpu, note=f"workers.count is {count}, the cluster has {there} {kind}")
