"""Autoscaling of replicas with the load."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import pytest

from pipelines.errors import ServiceError
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from services.transport.client import RayPlanner
from services.transport.scaling import Policy, Scaler
from services.transport.server import serve

PATIENCE = 60.0


def test_a_crowd_adds_one_replica_at_a_time_up_to_the_most() -> None:
    policy = Policy(most=2, crowd=4)
    assert policy.decide([3, 4], 0, 0.0) == 0
    assert policy.decide([3, 5], 0, 1.0) == 1
    assert policy.decide([8, 8, 0], 1, 2.0) == 1
    assert policy.decide([9, 9, 9, 9], 2, 3.0) == 0


def test_a_replica_goes_after_a_quiet_time_and_the_next_after_another() -> None:
    policy = Policy(most=2, quiet=10)
    assert [policy.decide([0, 0, 0], 2, now) for now in (0.0, 9.0, 10.0, 19.0, 20.0)] == [0, 0, -1, 0, -1]
    assert policy.decide([0], 0, 40.0) == 0


def test_any_problem_ends_the_quiet_time() -> None:
    policy = Policy(most=1, quiet=10)
    assert [policy.decide([load], 1, now) for load, now in ((0, 0.0), (1, 9.0), (0, 10.0), (0, 19.0))] == [0] * 4
    assert policy.decide([0], 1, 20.0) == -1


@pytest.mark.parametrize(("ray_address", "most"), [("127.0.0.1:1", 1), (None, 4)])
def test_fewer_than_the_replicas_or_no_cluster_is_refused(ray_address: str | None, most: int) -> None:
    with pytest.raises(ServiceError, match=rf"most: received {most} with"):
        serve(port=0, ray_address=ray_address, replicas=2, most=most)


def weighted(number: int) -> TransportProblem:
    generator = np.random.default_rng(number)
    x, y = generator.normal(size=(2, 300, 8))
    return TransportProblem.between(x, y, a=generator.random(300) + 0.1)


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_spare_replica_comes_takes_its_part_and_goes(ray_cluster: None) -> None:
    import ray

    from services.transport.actor import NAME, SPARE, find_replicas, handle, start_replicas, stop_replicas

    created: list[str] = []
    heard: list[list[str]] = []
    done = threading.Event()
    numbers = count()

    def client(_: int) -> list[tuple[int, float]]:
        planner, found = RayPlanner("crowd", deadline=PATIENCE), []
        while not done.is_set():
            number = next(numbers)
            found.append((number, planner.plan(weighted(number)).certificate.primal))
        return found

    def solved_by_the_spare() -> bool:
        if not heard or not heard[-1]:
            return False
        metrics = ray.get(handle(f"{SPARE}-0").metrics.remote(), timeout=10)
        return any(s.value for m in metrics for s in m.samples if s.name == "monge_transport_solves_total")

    try:
        start_replicas(resource=0.5, created=created)
        with (
            Scaler([NAME], Policy(most=1, crowd=3, quiet=0.5), 0.5, heard.append, looking=0.1),
            ThreadPoolExecutor(12) as pool,
        ):
            answers = pool.map(client, range(12))
            try:
                eventually(solved_by_the_spare)
            finally:
                done.set()
            found = [pair for part in answers for pair in part]
            eventually(lambda: heard[-1] == [])
            eventually(lambda: not _exists(f"{SPARE}-0"))
        assert heard == [[f"{SPARE}-0"], []]
        assert find_replicas() == [NAME]
        for number, primal in found[:: max(1, len(found) // 20)]:
            assert primal == pytest.approx(solve(weighted(number)).certificate.primal, rel=1e-5)
        # Ranks that meet now, and one that asked the spare replica last, are served by those that stay.
        assert RayPlanner("later").plan(weighted(0)).certificate.converged
    finally:
        stop_replicas(created)


def _exists(name: str) -> bool:
    from services.transport.actor import handle

    try:
        handle(name)
    except ServiceError:
        return False
    return True
