import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.errors import BusyError, ProblemError, RendezvousError, TooLargeError
from pipelines.transport.plan import RowBlock, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from services.transport.engine import Engine
from services.transport.limits import Limits
from services.transport.rendezvous import RankShare, Rendezvous
from tests.services.transport.support import GatedSolver, run, until

SIZES = [(3, 5), (0, 1), (4, 1)]
"""Uneven shares, one of them without source points: 7 points on each side."""


def shares(seed: int = 0, **changes: object) -> list[RankShare]:
    generator = np.random.default_rng(seed)
    return [
        replace(
            RankShare(
                "job", "step 1", rank, 3, generator.normal(size=(k, 2)), generator.normal(size=(m, 2)), ticket=str(rank)
            ),
            **changes,
        )
        for rank, (k, m) in enumerate(SIZES)
    ]


def whole(brought: list[RankShare]) -> np.ndarray:
    x, y = (np.concatenate([getattr(share, side) for share in brought]) for side in "xy")
    return solve(TransportProblem.between(x, y)).dense()


def assemble(blocks: list[RowBlock]) -> np.ndarray:
    dense = np.zeros((7, 7))
    start = 0
    for block, (k, _) in zip(blocks, SIZES, strict=True):
        np.add.at(dense, (block.rows + start, block.columns), block.mass)
        start += k
    return dense


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_each_rank_gets_its_rows_in_whatever_order_they_come(order: tuple[int, ...]) -> None:
    async def main() -> None:
        engine = Engine()
        rendezvous = Rendezvous(engine)
        brought = shares()
        calls = {}
        for rank in order:
            calls[rank] = asyncio.ensure_future(rendezvous.bring(brought[rank], 10))
            await asyncio.sleep(0)
        blocks = [await calls[rank] for rank in range(3)]
        np.testing.assert_array_equal(assemble(blocks), whole(brought))
        assert all(block.waited > 0 for block in blocks)
        assert rendezvous.meetings == 0
        assert engine.queued_bytes == 0

    run(main)


def test_a_missing_rank_is_named_to_all_who_wait() -> None:
    async def main() -> None:
        engine = Engine()
        rendezvous = Rendezvous(engine)
        first, _, third = shares()
        answers = await asyncio.gather(
            rendezvous.bring(first, 0.05), rendezvous.bring(third, 10), return_exceptions=True
        )
        assert all(isinstance(answer, RendezvousError) for answer in answers), answers
        assert all("step 1 of job: rank 1 did not send a share" in str(answer) for answer in answers)
        assert (rendezvous.meetings, engine.queued_bytes) == (0, 0)
        assert engine.metrics.registry.get_sample_value("monge_transport_rendezvous_timeouts_total") == 1

    run(main)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"world": 4}, "rank 2 has world size 4, rank 0, 1 3"),
        ({"cost": "euclidean"}, "cost euclidean"),
        ({"epsilon": 0.5}, "epsilon 0.5"),
        ({"x": np.zeros((2, 3)), "y": np.zeros((2, 3))}, "dimension 3"),
        ({"rank": 1, "ticket": "another"}, "rank 1 sent two shares"),
    ],
)
def test_ranks_that_disagree_all_get_the_same_error(change: dict[str, object], words: str) -> None:
    async def main() -> None:
        engine = Engine()
        rendezvous = Rendezvous(engine)
        first, second, third = shares()
        calls = [asyncio.ensure_future(rendezvous.bring(share, 10)) for share in (first, second)]
        await until(lambda: rendezvous.meetings == 1)
        with pytest.raises(RendezvousError, match=words):
            await rendezvous.bring(replace(third, **change), 10)
        for call in calls:
            with pytest.raises(RendezvousError, match=words):
                await call
        assert (rendezvous.meetings, engine.queued_bytes) == (0, 0)

    run(main)


def test_weights_of_the_targets_belong_to_the_problem() -> None:
    weights = [np.array([1.0, 2, 0, 4, 1]), np.array([3.0]), np.array([0.5])]

    async def main() -> None:
        engine = Engine()
        rendezvous = Rendezvous(engine)
        brought = [replace(share, b=b) for share, b in zip(shares(), weights, strict=True)]
        blocks = await asyncio.gather(*(rendezvous.bring(share, 10) for share in brought))
        b = np.concatenate(weights)
        np.testing.assert_allclose(assemble(blocks).sum(0), b / b.sum(), atol=1e-12)
        x, y = (np.concatenate([getattr(share, side) for share in brought]) for side in "xy")
        np.testing.assert_array_equal(assemble(blocks), solve(TransportProblem.between(x, y, b=b)).dense())
        assert engine.queued_bytes == 0

    run(main)


def test_weights_on_some_ranks_alone_are_refused() -> None:
    async def main() -> None:
        rendezvous = Rendezvous(Engine())
        brought = shares()
        brought[1] = replace(brought[1], b=np.ones(1))
        answers = await asyncio.gather(*(rendezvous.bring(share, 1) for share in brought), return_exceptions=True)
        assert "rank 1 has weights given, rank 0 none" in str(answers[1])

    run(main)


def test_a_key_used_again_with_another_ticket_is_a_new_problem() -> None:
    async def main() -> None:
        rendezvous = Rendezvous(Engine())
        for seed in (0, 1):
            brought = [replace(share, ticket=f"{seed}-{share.rank}") for share in shares(seed)]
            blocks = await asyncio.gather(*(rendezvous.bring(share, 10) for share in brought))
            np.testing.assert_array_equal(assemble(blocks), whole(brought))

    run(main)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_a_call_repeated_after_the_plan_was_solved_gets_the_same_rows(epsilon: float) -> None:
    async def main() -> None:
        engine = Engine()
        rendezvous = Rendezvous(engine)
        brought = shares(epsilon=epsilon)
        blocks = await asyncio.gather(*(rendezvous.bring(share, 30) for share in brought))
        for _ in range(2):
            again = await rendezvous.bring(brought[1], 30)
            np.testing.assert_array_equal(again.columns, blocks[1].columns)
            np.testing.assert_array_equal(again.mass, blocks[1].mass)
        assert (rendezvous.meetings, rendezvous.kept, engine.queued_bytes) == (0, 1, 0)
        assert engine.metrics.registry.get_sample_value("monge_transport_cache_misses_total") == 1

    run(main)


def test_a_call_repeated_after_the_meeting_failed_gets_the_same_error() -> None:
    async def main() -> None:
        rendezvous = Rendezvous(Engine())
        first, second, third = shares()
        third = replace(third, world=4)
        calls = [asyncio.ensure_future(rendezvous.bring(share, 30)) for share in (first, second)]
        await until(lambda: rendezvous.meetings == 1)
        for share in (third, first, second, third):
            with pytest.raises(RendezvousError, match="rank 2 has world size 4"):
                await rendezvous.bring(share, 30)
        await asyncio.gather(*calls, return_exceptions=True)
        assert (rendezvous.meetings, rendezvous.kept) == (0, 1)

    run(main)


def test_after_a_refusal_for_now_the_same_tickets_meet_anew() -> None:
    async def main() -> None:
        engine = Engine()
        rendezvous = Rendezvous(engine)
        brought = shares()
        submit, refusals = engine.submit, [engine.busy("many problems wait")]

        async def at_first_busy(*arguments: Any, **options: Any) -> TransportPlan:
            if refusals:
                raise refusals.pop()
            return await submit(*arguments, **options)

        engine.submit = at_first_busy  # type: ignore[method-assign]
        answers = await asyncio.gather(*(rendezvous.bring(share, 30) for share in brought), return_exceptions=True)
        assert [type(answer) for answer in answers] == [BusyError] * 3
        blocks = await asyncio.gather(*(rendezvous.bring(share, 30) for share in brought))
        np.testing.assert_array_equal(assemble(blocks), whole(brought))

    run(main)


def test_an_answer_is_kept_until_every_rank_has_it() -> None:
    async def main() -> None:
        rendezvous = Rendezvous(Engine())
        # Two problems at once: the numbers of their calls differ, and neither confirms the other.
        for number, key in enumerate(("one", "two")):
            brought = shares(number, key=key, number=number)
            await asyncio.gather(*(rendezvous.bring(replace(s, ticket=f"{key}{s.rank}"), 30) for s in brought))
        assert rendezvous.kept == 2
        later = [replace(share, key="three", ticket=f"three{share.rank}", number=2) for share in shares(3)]
        received = (2, 1, 2)
        await asyncio.gather(
            *(rendezvous.bring(replace(share, received=w), 30) for share, w in zip(later, received, strict=True))
        )
        assert rendezvous.kept == 2  # rank 1 has not confirmed the second, and the third is new
        lost = replace(shares(1, key="two")[1], ticket="two1")
        assert len((await rendezvous.bring(lost, 30)).rows) == 0  # it brought no source points
        assert rendezvous.kept == 2

    run(main)


def test_an_answer_is_kept_no_longer_than_the_deadline() -> None:
    async def main() -> None:
        rendezvous = Rendezvous(Engine(Limits(deadline=0.3)))
        share = replace(shares()[0], world=1, y=np.zeros((3, 2)))
        await rendezvous.bring(share, 60)
        await until(lambda: rendezvous.kept == 0)

    run(main)


def test_answers_that_are_kept_are_bounded_in_bytes_and_in_number() -> None:
    async def main() -> None:
        alone = [replace(shares()[0], world=1, y=np.zeros((3, 2)), key=str(i), ticket=str(i)) for i in range(4)]
        rendezvous = Rendezvous(Engine())
        await rendezvous.bring(alone[0], 30)
        size = rendezvous.kept_bytes
        assert size > 0
        for limits, most in ((Limits(kept_bytes=2 * size), 2), (Limits(queue=3), 3), (Limits(kept_bytes=0), 0)):
            rendezvous = Rendezvous(Engine(limits))
            for share in alone:
                await rendezvous.bring(share, 30)
            assert (rendezvous.kept, rendezvous.kept_bytes) == (most, most * size)
            assert [kept.name[1] for kept in rendezvous._kept] == [share.key for share in alone[4 - most :]]

    run(main)


def test_a_call_repeated_after_its_connection_broke_is_no_second_rank() -> None:
    async def main() -> None:
        engine = Engine()
        rendezvous = Rendezvous(engine)
        brought = shares()
        # The service has not noticed yet that the first call is not heard any more.
        stale = asyncio.ensure_future(rendezvous.bring(brought[0], 10))
        await until(lambda: rendezvous.meetings == 1)
        blocks = await asyncio.gather(*(rendezvous.bring(share, 10) for share in brought))
        np.testing.assert_array_equal(assemble(blocks), whole(brought))
        await stale
        assert (rendezvous.meetings, engine.queued_bytes) == (0, 0)

    run(main)


def test_a_call_repeated_while_the_plan_is_solved_joins_in(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(solver=gated)
        rendezvous = Rendezvous(engine)
        brought = shares()
        calls = [asyncio.ensure_future(rendezvous.bring(share, 10)) for share in brought]
        await gated.begun()
        calls[1].cancel()
        calls[1] = asyncio.ensure_future(rendezvous.bring(brought[1], 10))
        await asyncio.sleep(0)
        assert engine.queued_bytes == 0  # its points are in the problem that is being solved
        gated.gate.set()
        np.testing.assert_array_equal(assemble(await asyncio.gather(*calls)), whole(brought))
        assert len(gated.seen) == 1

    run(main)


def test_a_restarted_job_never_meets_shares_of_its_former_self() -> None:
    async def main() -> None:
        rendezvous = Rendezvous(Engine())
        left_behind = asyncio.ensure_future(rendezvous.bring(shares(0, job="job/first")[0], 10))
        await until(lambda: rendezvous.meetings == 1)
        brought = shares(1, job="job/second")
        blocks = await asyncio.gather(*(rendezvous.bring(share, 10) for share in brought))
        np.testing.assert_array_equal(assemble(blocks), whole(brought))
        left_behind.cancel()
        await asyncio.wait([left_behind])
        assert rendezvous.meetings == 0

    run(main)


def test_when_all_ranks_are_gone_nothing_is_kept_and_nothing_solved(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(workers=1, solver=gated)
        rendezvous = Rendezvous(engine)
        blocker = asyncio.ensure_future(engine.submit(TransportProblem.between(np.ones((2, 2)), np.ones((2, 2)))))
        await gated.begun()
        calls = [asyncio.ensure_future(rendezvous.bring(share, 10)) for share in shares()]
        await until(lambda: engine.waiting == 1)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await until(lambda: engine.waiting == 0)
        gated.gate.set()
        await blocker
        assert (rendezvous.meetings, engine.queued_bytes, len(gated.seen)) == (0, 0, 1)

    run(main)


def test_the_limits_hold_for_the_whole_problem() -> None:
    async def main() -> None:
        engine = Engine(Limits(points=6))
        rendezvous = Rendezvous(engine)
        answers = await asyncio.gather(*(rendezvous.bring(share, 10) for share in shares()), return_exceptions=True)
        assert [type(answer) for answer in answers] == [TooLargeError] * 3
        assert (rendezvous.meetings, engine.queued_bytes) == (0, 0)

    run(main)


def test_shares_that_wait_are_bounded_in_bytes_and_in_number() -> None:
    async def main() -> None:
        share = shares()[0]
        engine = Engine(Limits(queued_bytes=share.size, queue=1))
        rendezvous = Rendezvous(engine)
        waiting = asyncio.ensure_future(rendezvous.bring(share, 10))
        await until(lambda: rendezvous.meetings == 1)
        with pytest.raises(BusyError, match="MiB of points waiting"):
            await rendezvous.bring(shares()[2], 10)
        with pytest.raises(BusyError, match="1 global problems waiting"):
            await rendezvous.bring(replace(share, key="step 2"), 10)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert (rendezvous.meetings, engine.queued_bytes) == (0, 0)

    run(main)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"rank": 3}, RendezvousError),
        ({"rank": -1}, RendezvousError),
        ({"world": 0}, RendezvousError),
        ({"world": 10**9}, RendezvousError),
        ({"x": np.zeros(3)}, ProblemError),
        ({"x": np.zeros((3, 9))}, ProblemError),
        ({"b": np.ones(4)}, ProblemError),
    ],
)
def test_a_share_that_cannot_be_right_is_refused_at_once(change: dict[str, object], error: type[Exception]) -> None:
    async def main() -> None:
        rendezvous = Rendezvous(Engine())
        with pytest.raises(error):
            await rendezvous.bring(replace(shares()[0], **change), 10)
        assert rendezvous.meetings == 0

    run(main)


def test_points_that_make_no_problem_fail_on_every_rank() -> None:
    async def main() -> None:
        rendezvous = Rendezvous(Engine())
        brought = shares()
        brought[1] = replace(brought[1], y=np.full((1, 2), np.nan))
        answers = await asyncio.gather(*(rendezvous.bring(share, 10) for share in brought), return_exceptions=True)
        assert [type(answer) for answer in answers] == [ProblemError] * 3

    run(main)
