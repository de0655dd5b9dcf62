"""Couplings that are solved ahead of training."""

import threading

import pytest
import torch

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.randomness import step_generator
from pipelines.transport.plan import TransportPlan
from pipelines.transport.planner import LocalPlanner
from pipelines.transport.problem import TransportProblem
from pipelines.transport.stream import CouplingStream

POOL, BATCH = 12, 4


def draw(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = step_generator(0, number, "test")
    return torch.randn(POOL, 1, 2, generator=generator), torch.randn(POOL, 1, 2, generator=generator)


class Counting(LocalPlanner):
    """A planner that counts its requests, and can be blocked."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0
        self.fault: Exception | None = None

    def plan(self, problem: TransportProblem) -> TransportPlan:
        self.calls += 1
        self.asked.release()
        assert self.gate.wait(10)
        if self.fault is not None:
            raise self.fault
        return super().plan(problem)


def stream(planner: LocalPlanner | None = None, **options: int) -> CouplingStream:
    return CouplingStream(planner or LocalPlanner(), draw, pool=POOL, batch=BATCH, **options)


def test_a_pool_gives_each_point_once_along_its_optimal_plan() -> None:
    with stream() as pairs:
        for number in range(3):
            x, y = draw(number)
            plan = LocalPlanner().plan(TransportProblem.between(x, y))
            assert plan.assignment is not None
            batches = [pairs.at(3 * number + place) for place in range(3)]
            sources = torch.cat([batch.sources for batch in batches])
            targets = torch.cat([batch.targets for batch in batches])
            assert sorted(sources.tolist()) == targets.tolist() == list(range(POOL))
            assert targets.tolist() == plan.assignment[sources.numpy()].tolist()
            for batch in batches:
                assert batch.pool == number
                assert batch.certificate.primal == plan.certificate.primal
                torch.testing.assert_close(batch.x, x[batch.sources], rtol=0, atol=0)
                torch.testing.assert_close(batch.y, y[batch.targets], rtol=0, atol=0)


def test_a_batch_is_a_function_of_the_step() -> None:
    with stream(ahead=1) as first, stream(ahead=3) as second:
        in_order = [first.at(step) for step in range(9)]
        for step in (7, 0, 8, 3, 3):
            assert second.at(step).sources.tolist() == in_order[step].sources.tolist()
            assert second.at(step).targets.tolist() == in_order[step].targets.tolist()


@pytest.mark.parametrize("ahead", [1, 3])
def test_the_plans_ahead_are_asked_for_before_they_are_needed_and_no_others(ahead: int) -> None:
    planner = Counting()
    with stream(planner, ahead=ahead) as pairs:
        pairs.at(0)
        for _ in range(ahead + 1):
            assert planner.asked.acquire(timeout=10)
        assert planner.calls == ahead + 1
        pairs.at(1)
        pairs.at(2)
        assert planner.calls == ahead + 1
        pairs.at(3)
        assert planner.asked.acquire(timeout=10)
        assert planner.calls == ahead + 2


def test_no_plan_beyond_the_last_step_is_solved_ahead() -> None:
    planner = Counting()
    with stream(planner, ahead=3, steps=4) as pairs:
        for step in range(4):
            pairs.at(step)
        pairs._threads.shutdown(wait=True)
    assert planner.calls == 2


@pytest.mark.parametrize("wrong", [{"ahead": 0}, {"steps": 0}])
def test_no_plans_ahead_and_no_steps_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ProblemError, match=f"{next(iter(wrong))}: 0 received"):
        stream(**wrong)


def test_the_time_waited_is_told() -> None:
    planner = Counting()
    planner.gate.clear()
    with stream(planner) as pairs:
        threading.Timer(0.1, planner.gate.set).start()
        assert pairs.at(0).waited >= 0.05
        assert pairs.at(1).waited < 0.05


def test_a_plan_that_could_not_be_had_is_asked_for_again() -> None:
    planner = Counting()
    planner.fault = NotConvergedError("it stopped short")
    with stream(planner) as pairs:
        with pytest.raises(NotConvergedError):
            pairs.at(0)
        planner.fault = None
        assert len(pairs.at(0).x) == BATCH


@pytest.mark.parametrize(("pool", "batch"), [(12, 5), (4, 8), (0, 4), (12, 0)])
def test_a_pool_that_does_not_divide_is_refused(pool: int, batch: int) -> None:
    with pytest.raises(ProblemError, match=f"a pool of {pool} does not divide into batches of {batch}"):
        CouplingStream(LocalPlanner(), draw, pool=pool, batch=batch)


def test_a_pool_of_another_size_than_promised_is_refused() -> None:
    with CouplingStream(LocalPlanner(), draw, pool=8, batch=4) as pairs, pytest.raises(ProblemError, match="pool 0"):
        pairs.at(0)
