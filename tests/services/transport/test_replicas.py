"""The service as actors on a real Ray cluster."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipelines.errors import ProblemError, RendezvousError, ServiceError, TooLargeError
from pipelines.transport.plan import RowBlock
from pipelines.transport.planner import Share
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from services.settings import NAMESPACE
from services.transport.client import RayPlanner
from services.transport.limits import Limits
from tests.services.transport.support import ASSIGNMENT, labelled, run

X, Y = torch.randn(40, 1, 2, 2), torch.randn(40, 1, 2, 2)
POINTS = 300


@pytest.fixture(scope="module")
def started(ray_cluster: None) -> Iterator[list[str]]:
    from services.transport.actor import find_replicas, start_replicas, stop_replicas

    created: list[str] = []
    start_replicas(2, Limits(points=POINTS), resource=0.5, created=created)
    assert created == find_replicas() == ["transport-0", "transport-1"]
    yield created
    stop_replicas(created)


@pytest.fixture
def replicas(started: list[str]) -> list[str]:
    """Return two running replicas, restarted if the last test killed them."""
    from services.transport.actor import start_replicas

    start_replicas(2)
    return started


def ranks(world: int, ask: Callable[[int], RowBlock]) -> list[Future[RowBlock]]:
    """Run concurrent ranks; return their results, errors included."""
    with ThreadPoolExecutor(world) as pool:
        return [pool.submit(ask, rank) for rank in range(world)]


def kill(name: str) -> None:
    import ray

    ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=False)


def test_a_plan_is_that_of_the_solver_and_its_arrays_are_the_callers(replicas: list[str]) -> None:
    problem = TransportProblem.between(X, Y)
    plan = RayPlanner("job").plan(problem)
    assert plan.assignment is not None
    np.testing.assert_array_equal(plan.assignment, solve(problem).assignment)
    plan.assignment[0] = plan.assignment[0]  # writable
    assert plan.certificate.converged


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_every_rank_gets_its_rows(replicas: list[str], world: int, dtype: torch.dtype) -> None:
    x, y = ((points * 50).abs().to(dtype) for points in (X, Y))
    parts = [Share("step 1", x[r::world], y[r::world]) for r in range(world)]
    ordered = [torch.cat(list(side)) for side in zip(*((part.x, part.y) for part in parts), strict=True)]
    whole = solve(TransportProblem.between(*ordered))
    answers = ranks(world, lambda r: RayPlanner(f"job {dtype}", r, world, 20, attempt=f"{world}").plan_rows(parts[r]))
    blocks = [answer.result() for answer in answers]
    assert whole.assignment is not None
    np.testing.assert_array_equal(np.concatenate([block.columns for block in blocks]), whole.assignment)
    assert all(block.waited > 0 for block in blocks)
    assert {block.certificate.primal for block in blocks} == {whole.certificate.primal}


def test_several_plans_travel_together(replicas: list[str]) -> None:
    """Each rank receives its blocks in the order of its shares, in any order of solving."""

    def shares(rank: int) -> list[Share]:
        half = slice(20 * rank, 20 * rank + 20)
        return [Share(f"step 1-{k}", (k + 1) * X[half], Y[half]) for k in range(5)]

    answers = ranks(2, lambda r: RayPlanner("several", r, 2, 20, attempt="a").plan_rows_each(shares(r)))
    for k, blocks in enumerate(zip(*(answer.result() for answer in answers), strict=True)):
        whole = solve(TransportProblem.between((k + 1) * X, Y))
        assert whole.assignment is not None
        np.testing.assert_array_equal(np.concatenate([block.columns for block in blocks]), whole.assignment)
    assert RayPlanner("none", attempt="a").plan_rows_each([]) == []


def test_a_missing_rank_is_named(replicas: list[str]) -> None:
    with pytest.raises(RendezvousError, match="rank 1 did not send a share"):
        RayPlanner("job", 0, 2, 0.3, attempt="a").plan_rows(Share("step 1", X, Y))


def test_errors_arrive_as_they_were_raised(replicas: list[str]) -> None:
    with pytest.raises(TooLargeError, match=f"maximum is {POINTS}") as refusal:
        RayPlanner("job").plan(labelled(1, n=POINTS + 1))
    assert refusal.value.hint
    with pytest.raises(ProblemError, match="brute force"):
        RayPlanner("job", solver="brute-force").plan(labelled(1, n=9))


@pytest.mark.slow
def test_a_killed_replica_is_waited_for_and_all_ranks_get_the_right_rows(replicas: list[str]) -> None:
    import ray

    from services.transport.actor import replica_of

    whole = solve(TransportProblem.between(X, Y))
    replica = replica_of(b"victim", replicas)
    asked = threading.Event()

    def ask(rank: int) -> RowBlock:
        if rank == 1:
            # The first rank waits in the actor, which then dies with its share.
            assert asked.wait(20)
            kill(replica)
        planner = RayPlanner("victim", rank, 2, 40, attempt="a")
        half = slice(20 * rank, 20 * rank + 20)
        if rank == 0:
            actor = ray.get_actor(replica, namespace=NAMESPACE)
            watch = threading.Thread(target=lambda: (_wait_for_meeting(actor), asked.set()))
            watch.start()
        return planner.plan_rows(Share("step 1", X[half], Y[half]))

    blocks = [answer.result() for answer in ranks(2, ask)]
    assert whole.assignment is not None
    np.testing.assert_array_equal(np.concatenate([block.columns for block in blocks]), whole.assignment)


def _wait_for_meeting(actor: object) -> None:
    import ray

    while not ray.get(actor.meetings.remote(), timeout=10):  # type: ignore[attr-defined]
        pass


@pytest.mark.slow
def test_the_gateway_asks_another_replica_when_one_dies(replicas: list[str]) -> None:
    from services.transport.actor import replica_of
    from services.transport.cache import sketch
    from services.transport.gateway import RayBackend

    async def main() -> None:
        backend = RayBackend(replicas)
        problems = [labelled(label, n=30) for label in range(40)]
        victim = replicas[0]
        theirs = [problem for problem in problems if replica_of(sketch(problem, "auto"), replicas) == victim]
        kill(victim)
        plans = await asyncio.gather(*(backend.plan(problem, "client", "auto") for problem in theirs))
        for problem, plan in zip(theirs, plans, strict=True):
            np.testing.assert_array_equal(plan.assignment, solve(problem).assignment)

    run(main, 60)


def test_a_replica_that_stays_away_is_a_service_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorUnavailableError

    from services.transport import gateway

    asked: list[str] = []

    async def away(name: str, method: str, *arguments: object) -> None:
        asked.append(name)
        raise ActorUnavailableError("it restarts", None)

    monkeypatch.setattr(gateway, "_ask", away)

    async def main() -> None:
        with pytest.raises(ServiceError, match=r"transport-1 is unreachable.*it restarts"):
            await gateway.RayBackend(["transport-1"], patience=0.2).plan(labelled(1), "client", "auto")

    run(main)
    assert len(asked) > 1


def test_the_gateway_passes_on_errors_limits_and_the_metrics_of_all(replicas: list[str]) -> None:
    from services.transport.gateway import RayBackend

    async def main() -> None:
        backend = RayBackend(replicas)
        assert (await backend.limits()).points == POINTS
        with pytest.raises(TooLargeError):
            await backend.plan(labelled(1, n=POINTS + 1), "client", "auto")
        for label in range(20):
            await backend.plan(labelled(100 + label), "client", "auto")
        text = (await backend.metrics()).decode()
        assert text.count("# TYPE monge_transport_solves_total") == 1
        for name in replicas:
            assert f'monge_transport_solves_total{{replica="{name}",solver="{ASSIGNMENT}"}}' in text

    run(main, 60)


def test_a_call_that_is_given_up_is_cancelled_in_the_actor(replicas: list[str]) -> None:
    import ray

    from services.transport.actor import replica_of
    from services.transport.gateway import RayBackend
    from services.transport.rendezvous import RankShare

    share = RankShare("given up", "step 1", 0, 2, np.ones((2, 2)), np.ones((2, 2)))
    actor = ray.get_actor(replica_of(b"given up", replicas), namespace=NAMESPACE)

    async def main() -> None:
        call = asyncio.ensure_future(RayBackend(replicas).bring(share, 60))
        while not await actor.meetings.remote():
            pass
        call.cancel()
        await asyncio.wait([call])
        while await actor.meetings.remote():
            pass

    run(main)


def test_without_the_resource_or_the_service_it_is_said_what_is_missing(ray_cluster: None) -> None:
    from services.transport.actor import replica_names, start_replicas

    with pytest.raises(ServiceError, match=r"offer 4 of the resource 'transport', 7 replicas require 1 each"):
        start_replicas(7, timeout=0.1)
    assert replica_names(1) == ["transport"]


def test_an_absent_service_is_a_service_error_after_the_deadline(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.transport import actor

    monkeypatch.setattr(actor, "NAME", "nobody")
    with pytest.raises(ServiceError, match=r"was unreachable for 0\.2 s: no transport service is running"):
        RayPlanner("job", deadline=0.2).plan(labelled(1))
