import asyncio
import threading

import numpy as np
import pytest
import torch

from pipelines.errors import BusyError, NotConvergedError, ProblemError, ServiceError, TooLargeError, TransportError
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName, solve
from services.transport.cache import sketch
from services.transport.engine import BATCH, Engine
from services.transport.limits import Limits
from tests.services.transport.support import ASSIGNMENT, GatedSolver, labelled, run, until

BLOCKER = 1000.0


def value(engine: Engine, name: str, **labels: str) -> float:
    return engine.metrics.registry.get_sample_value(f"monge_transport_{name}", labels) or 0.0


async def blocked(engine: Engine, gated: GatedSolver) -> asyncio.Future[TransportPlan]:
    """Block the only thread of an engine, so that new problems wait."""
    blocker = asyncio.ensure_future(engine.submit(labelled(BLOCKER, n=200)))
    await gated.begun()
    return blocker


def test_a_plan_is_that_of_the_solver() -> None:
    async def main() -> None:
        engine = Engine()
        problem = labelled(1, n=20)
        plan = await engine.submit(problem)
        np.testing.assert_array_equal(plan.assignment, solve(problem).assignment)
        assert value(engine, "solves_total", solver=ASSIGNMENT) == 1
        assert value(engine, "milliseconds_count", stage="solve") == 1
        assert value(engine, "relative_gap_count") == 1
        assert (engine.queued_bytes, engine.waiting) == (0, 0)

    run(main)


def test_clients_take_turns(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(workers=1, solver=gated)
        calls = [await blocked(engine, gated)]
        # Large ones, so that they do not share a hop between threads.
        for label, client in ((1, "eager"), (2, "eager"), (3, "eager"), (11, "late"), (21, "last")):
            calls.append(asyncio.ensure_future(engine.submit(labelled(label, n=200), client)))
        await until(lambda: engine.waiting == 5)
        gated.gate.set()
        await asyncio.gather(*calls)
        assert gated.seen == [BLOCKER, 1, 11, 21, 2, 3]

    run(main)


def test_a_large_problem_that_is_alone_has_the_threads_that_the_engine_was_given() -> None:
    """OpenMP counts threads per calling thread, and Ray limits its actors to one."""
    seen: list[int] = []

    def solver(problem: TransportProblem, name: SolverName) -> TransportPlan:
        seen.append(torch.get_num_threads())
        return solve(problem, name)

    async def main() -> None:
        engine = Engine(threads=3, solver=solver)
        await engine.submit(labelled(1, n=200))
        await engine.submit(labelled(2, n=20))
        assert seen == [3, 1]

    before = torch.get_num_threads()
    run(main)
    assert torch.get_num_threads() == before


def test_small_problems_share_a_hop_and_large_ones_do_not(gated: GatedSolver) -> None:
    async def main() -> None:
        hops: list[int] = []
        engine = Engine(workers=1, solver=gated)
        work = engine._work
        engine._work = lambda loop, batch, threads: (hops.append(len(batch)), work(loop, batch, threads))[1]  # type: ignore[method-assign]
        calls = [await blocked(engine, gated)]
        calls += [asyncio.ensure_future(engine.submit(labelled(label))) for label in range(BATCH + 3)]
        calls += [asyncio.ensure_future(engine.submit(labelled(label, n=200), "b")) for label in (50, 51)]
        await until(lambda: engine.waiting == BATCH + 5)
        gated.gate.set()
        await asyncio.gather(*calls)
        assert sum(hops) == len(calls)
        assert max(hops) > 1
        assert hops.count(1) >= 3

    run(main)


def test_a_cancelled_call_leaves_the_queue(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(Limits(queue=1), workers=1, solver=gated)
        blocker = await blocked(engine, gated)
        call = asyncio.ensure_future(engine.submit(labelled(1)))
        await until(lambda: engine.waiting == 1)
        with pytest.raises(BusyError):
            await engine.submit(labelled(2))
        call.cancel()
        await asyncio.wait([call])
        assert (engine.waiting, engine.queued_bytes) == (0, 0)
        third = asyncio.ensure_future(engine.submit(labelled(3)))
        await until(lambda: engine.waiting == 1)
        gated.gate.set()
        await asyncio.gather(blocker, third)
        assert gated.seen == [BLOCKER, 3]

    run(main)


def test_equal_problems_in_flight_are_solved_once(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(workers=1, solver=gated)
        calls = [asyncio.ensure_future(engine.submit(labelled(7), client)) for client in "abc"]
        await gated.begun()
        await until(lambda: value(engine, "cache_hits_total", how="in flight") == 2)
        # One of the three hangs up; the others still get their plan.
        calls[0].cancel()
        await asyncio.wait(calls[:1])
        gated.gate.set()
        first, second = await asyncio.gather(*calls[1:])
        assert first is second
        assert gated.seen == [7]

    run(main)


def test_problems_that_only_look_equal_are_not_confused(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(workers=1, solver=gated)
        x = np.zeros((2000, 3), dtype=np.float32)
        other = x.copy()
        other[3, 2] = 1  # the twelfth of 6000 numbers: the sketch takes every fifth
        assert sketch(TransportProblem.between(x, x), "auto") == sketch(TransportProblem.between(other, x), "auto")
        calls = [asyncio.ensure_future(engine.submit(TransportProblem.between(p, x))) for p in (x, other)]
        await gated.begun()
        gated.gate.set()
        plain, moved = await asyncio.gather(*calls)
        assert plain.certificate.primal == 0
        assert moved.certificate.primal > 0
        await until(lambda: value(engine, "cache_bytes") == 2 * 3 * 2000 * 8)  # kept after they were delivered
        for points, primal in ((x, 0.0), (other, moved.certificate.primal)):
            assert (await engine.submit(TransportProblem.between(points, x))).certificate.primal == primal
        assert len(gated.seen) == 2

    run(main)


def test_a_repeated_problem_is_answered_from_memory_until_newer_ones_push_it_out() -> None:
    async def main() -> None:
        size = 20 * 8 * 3  # an assignment and two potentials
        engine = Engine(Limits(cache_bytes=2 * size), workers=1)
        for label in (1, 2):
            await engine.submit(labelled(label, n=20))
        await engine.submit(labelled(1, n=20))
        assert value(engine, "cache_hits_total", how="kept") == 1
        assert value(engine, "cache_bytes") == 2 * size
        await engine.submit(labelled(3, n=20))  # pushes out 2, which was used longest ago
        await engine.submit(labelled(1, n=20))
        assert value(engine, "cache_hits_total", how="kept") == 2
        await engine.submit(labelled(2, n=20))
        assert value(engine, "cache_misses_total") == 4

    run(main)


def test_the_solver_and_every_term_of_a_problem_tell_it_from_others() -> None:
    async def main() -> None:
        engine = Engine()
        x, y = np.eye(3), np.eye(3)[::-1]
        weights = np.array([0.5, 0.25, 0.25])
        problems = [
            (TransportProblem.between(x, y), "auto"),
            (TransportProblem.between(x, y), "assignment"),
            (TransportProblem.between(x, y, cost="euclidean"), "auto"),
            (TransportProblem.between(x, y, a=weights), "auto"),
            (TransportProblem.between(x, y, b=weights), "auto"),
            (TransportProblem.from_cost(x), "auto"),
        ]
        for problem, solver in problems:
            await engine.submit(problem, "", solver)
        assert value(engine, "cache_misses_total") == len(problems)

    run(main)


def test_what_is_too_large_is_refused() -> None:
    async def main() -> None:
        engine = Engine(Limits(points=10, input_bytes=1000))
        with pytest.raises(TooLargeError, match="received 11 × 11 points, the maximum is 10"):
            await engine.submit(labelled(1, n=11))
        with pytest.raises(TooLargeError, match="MiB of input"):
            await engine.submit(labelled(1, n=10, d=100))
        assert value(engine, "refusals_total", error="TooLargeError") == 2

    run(main)


def test_a_full_queue_says_when_to_come_back(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(Limits(queue=3, queue_per_client=2), workers=1, solver=gated)
        calls = [await blocked(engine, gated)]
        calls += [asyncio.ensure_future(engine.submit(labelled(label), "greedy")) for label in (1, 2)]
        await until(lambda: engine.waiting == 2)
        with pytest.raises(BusyError, match="2 problems of greedy wait"):
            await engine.submit(labelled(3), "greedy")
        calls.append(asyncio.ensure_future(engine.submit(labelled(4), "modest")))
        await until(lambda: engine.waiting == 3)
        with pytest.raises(BusyError, match="3 problems waiting") as refusal:
            await engine.submit(labelled(5), "third")
        assert 0.1 <= refusal.value.retry_after <= 60
        assert value(engine, "refusals_total", error="BusyError") == 2
        gated.gate.set()
        await asyncio.gather(*calls)

    run(main)


def test_the_time_to_come_back_follows_the_solves(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(Limits(queue=1), workers=1, solver=gated)
        blocker = await blocked(engine, gated)
        waiting = asyncio.ensure_future(engine.submit(labelled(1, n=200)))
        await until(lambda: engine.waiting == 1)
        waits = []
        for seconds_per_pair in (1e-9, 1e-4, 1.0):
            engine._seconds_per_pair = seconds_per_pair
            with pytest.raises(BusyError) as refusal:
                await engine.submit(labelled(2))
            waits.append(refusal.value.retry_after)
        assert waits == [0.1, pytest.approx(0.5 * 2 * 200 * 200 * 1e-4), 60.0]
        gated.gate.set()
        await asyncio.gather(blocker, waiting)
        await until(lambda: engine._pairs == 0)

    run(main)


def test_bytes_that_wait_are_bounded(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(Limits(queued_bytes=300), workers=1, solver=gated)
        blocker = asyncio.ensure_future(engine.submit(labelled(1)))
        await gated.begun()
        waiting = asyncio.ensure_future(engine.submit(labelled(2)))  # 2 · 4 · 3 float64
        await until(lambda: engine.queued_bytes == 192)
        with pytest.raises(BusyError, match="MiB of points waiting"):
            await engine.submit(labelled(3))
        gated.gate.set()
        await asyncio.gather(blocker, waiting)
        assert engine.queued_bytes == 0

    run(main)


def test_errors_of_a_solve_reach_all_who_wait_and_are_not_kept() -> None:
    class Stubborn:
        calls = 0
        entered = threading.Event()
        gate = threading.Event()

        def __call__(self, problem: TransportProblem, solver: str) -> TransportPlan:
            self.calls += 1
            self.entered.set()
            assert self.gate.wait(10)
            raise NotConvergedError("it stopped short", hint="allow more iterations")

    async def main() -> None:
        stubborn = Stubborn()
        engine = Engine(solver=stubborn)
        calls = [asyncio.ensure_future(engine.submit(labelled(1))) for _ in range(2)]
        await asyncio.to_thread(stubborn.entered.wait, 10)
        await until(lambda: value(engine, "cache_hits_total", how="in flight") == 1)
        stubborn.gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [NotConvergedError] * 2
        with pytest.raises(NotConvergedError):
            await engine.submit(labelled(1))
        assert stubborn.calls == 2
        assert value(engine, "failures_total", error="NotConvergedError") == 2

    run(main)


def test_a_solver_that_breaks_down_gives_a_typed_error_and_the_engine_goes_on() -> None:
    def broken(problem: TransportProblem, solver: str) -> TransportPlan:
        if solver == "brute-force":
            raise MemoryError("no more")
        return solve(problem)

    async def main() -> None:
        engine = Engine(workers=1, solver=broken)
        with pytest.raises(TransportError, match="crashed on a problem of shape \\(4, 4\\): MemoryError"):
            await engine.submit(labelled(1), "", "brute-force")
        await engine.submit(labelled(1))

    run(main)


def test_a_problem_the_solver_does_not_take_is_the_callers_error() -> None:
    async def main() -> None:
        with pytest.raises(ProblemError):
            await Engine().submit(labelled(1, n=9), "", "brute-force")

    run(main)


def test_a_closed_engine_refuses_what_waits_and_what_comes(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(workers=1, solver=gated)
        blocker = await blocked(engine, gated)
        waiting = asyncio.ensure_future(engine.submit(labelled(1)))
        await until(lambda: engine.waiting == 1)
        closing = asyncio.ensure_future(engine.close())
        with pytest.raises(ServiceError, match="shutting down"):
            await waiting
        with pytest.raises(ServiceError, match="shutting down"):
            await engine.submit(labelled(2))
        gated.gate.set()
        await closing
        await blocker  # what had begun is answered

    run(main)
