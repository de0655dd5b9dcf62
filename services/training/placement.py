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


def placement_of(spec: WorkersSpec, resources: Mapping[str, float]) -> Placement:
    """Place the workers of a job.

    With device ``auto`` a cluster with GPUs trains on GPUs, with fewer workers where it has fewer of them: the batch
    is global, and what is trained does not depend on the number of workers.

    Args:
        spec: ``workers`` of the job's spec.
        resources: of the cluster, as Ray counts them.

    Raises:
        ServiceError: the cluster has too few GPUs or CPUs.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if spec.device == "gpu" and gpus < spec.count:
        raise ServiceError(
            f"workers.count: {spec.count} GPUs asked for, the cluster has {gpus}",
            cure="set workers.count or workers.device, or add GPU nodes",
        )
    if spec.device != "cpu" and gpus:
        if gpus >= spec.count:
            return Placement(spec.count, gpu=True)
        have = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        return Placement(gpus, gpu=True, note=f"workers.count is {spec.count}, the cluster has {have}")
    if cpus < spec.count:
        raise ServiceError(
            f"workers.count: {spec.count} CPUs asked for, the cluster has {cpus}",
            cure=f"set workers.count to {cpus} or less, or add nodes",
        )
    return Placement(spec.count, gpu=False)
