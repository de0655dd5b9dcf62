"""On what the workers of a job run."""

from __future__ import annotations

import pytest

from pipelines.errors import ServiceError
from pipelines.spec import WorkersSpec
from services.training.placement import Placement, placement_of


@pytest.mark.parametrize(
    ("count", "device", "resources", "expected"),
    [
        (2, "auto", {"CPU": 2.0}, Placement(2, gpu=False)),
        (2, "auto", {"CPU": 8.0, "GPU": 2.0}, Placement(2, gpu=True)),
        (2, "auto", {"CPU": 8.0, "GPU": 1.0}, Placement(1, gpu=True, note="workers.count is 2, the cluster has 1 GPU")),
        (
            8,
            "auto",
            {"CPU": 2.0, "GPU": 2.0},
            Placement(2, gpu=True, note="workers.count is 8, the cluster has 2 GPUs"),
        ),
        (2, "cpu", {"CPU": 8.0, "GPU": 2.0}, Placement(2, gpu=False)),
        (2, "gpu", {"CPU": 8.0, "GPU": 2.0}, Placement(2, gpu=True)),
    ],
)
def test_workers_take_what_the_cluster_has(
    count: int, device: str, resources: dict[str, float], expected: Placement
) -> None:
    assert placement_of(WorkersSpec.model_validate({"count": count, "device": device}), resources) == expected


@pytest.mark.parametrize(
    ("count", "device", "resources", "message"),
    [
        (64, "auto", {"CPU": 2.0}, "workers.count: 64 CPUs asked for, the cluster has 2"),
        (64, "cpu", {"CPU": 2.0, "GPU": 64.0}, "workers.count: 64 CPUs asked for, the cluster has 2"),
        (2, "gpu", {"CPU": 2.0, "GPU": 1.0}, "workers.count: 2 GPUs asked for, the cluster has 1"),
        (1, "auto", {}, "workers.count: 1 CPUs asked for, the cluster has 0"),
    ],
)
def test_too_many_workers(count: int, device: str, resources: dict[str, float], message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        placement_of(WorkersSpec.model_validate({"count": count, "device": device}), resources)


def test_it_reads_as_a_person_says_it() -> None:
    assert str(Placement(1, gpu=True)) == "1 worker on GPUs"
    assert str(Placement(2, gpu=False)) == "2 workers on CPUs"
