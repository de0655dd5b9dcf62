"""Resources and devices of the workers of a job."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipelines.errors import ServiceError
from pipelines.spec import WorkersSpec
from services.training.placement import Placement, exactly, placement_of


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
        (64, "auto", {"CPU": 2.0}, "workers.count: 64 CPUs requested, the cluster has 2"),
        (64, "cpu", {"CPU": 2.0, "GPU": 64.0}, "workers.count: 64 CPUs requested, the cluster has 2"),
        (2, "gpu", {"CPU": 2.0, "GPU": 1.0}, "workers.count: 2 GPUs requested, the cluster has 1"),
        (1, "auto", {}, "workers.count: 1 CPUs requested, the cluster has 0"),
    ],
)
def test_too_many_workers(count: int, device: str, resources: dict[str, float], message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        placement_of(WorkersSpec.model_validate({"count": count, "device": device}), resources)


def test_fewer_workers_than_asked_for_where_the_spec_allows_it() -> None:
    spec = WorkersSpec(count=4, min=2)
    assert placement_of(spec, {"CPU": 8.0}) == Placement(4, gpu=False)
    assert placement_of(spec, {"CPU": 3.0}) == Placement(3, False, note="workers.count is 4, the cluster has 3 CPUs")
    with pytest.raises(ServiceError, match=r"workers\.min: 2 CPUs requested, the cluster has 1"):
        placement_of(spec, {"CPU": 1.0})
    with pytest.raises(ServiceError, match=r"workers\.min: 2 GPUs requested, the cluster has 1"):
        placement_of(spec.model_copy(update={"device": "gpu"}), {"CPU": 8.0, "GPU": 1.0})
    assert placement_of(exactly(spec, 3), {"CPU": 8.0}) == Placement(3, gpu=False)
    with pytest.raises(ServiceError, match=r"workers\.count: 3 CPUs requested"):
        placement_of(exactly(spec, 3), {"CPU": 2.0})


def test_min_is_within_count() -> None:
    with pytest.raises(ValidationError, match="min 3 is more than count 2"):
        WorkersSpec(count=2, min=3)


def test_it_reads_as_a_person_says_it() -> None:
    assert str(Placement(1, gpu=True)) == "1 worker on GPUs"
    assert str(Placement(2, gpu=False)) == "2 workers on CPUs"
