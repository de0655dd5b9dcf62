"""A worker publishes its position and stack, and ends if it hangs; a list replaces Ray's store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.training.position import Position
from services.platform.processes import wait_until
from services.training import watch
from services.training.watch import STUCK, Watch, _lines


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[dict[str, Any]], list[int]]]:
    """Return a function that watches a thread until it ends."""
    monkeypatch.setattr(watch, "EVERY", 0.02)

    def look(work: Callable[[Position, list[int]], object], deadline: float) -> tuple[list[dict[str, Any]], list[int]]:
        seen: list[dict[str, Any]] = []
        ended: list[int] = []
        position = Position()
        with Watch(position, 1, deadline, lambda rank, one: seen.append(one | {"rank": rank}), ended.append):
            work(position, ended)
        return seen, ended

    return look


def _waits_in_a_lock(position: Position, ended: list[int]) -> None:
    position.step, position.doing = 7, "in phase critic"
    assert wait_until(lambda: bool(ended), timeout=60)


def test_a_process_that_hangs_is_ended_and_its_stack_is_known(watched: Any) -> None:
    seen, ended = watched(_waits_in_a_lock, 0.5)
    assert ended == [STUCK]
    last = seen[-1]
    assert (last["rank"], last["step"], last["doing"], last["hangs"]) == (1, 7, "in phase critic", True)
    assert "_waits_in_a_lock" in last["stack"]
    told = list(_lines(1, last))
    assert told[0].startswith("rank 1 was after step 7, in phase critic, where it hung, seen ")
    assert any("_waits_in_a_lock" in line for line in told[1:])


def test_a_process_that_moves_is_not_ended(watched: Any) -> None:
    def moves(position: Position, ended: list[int]) -> None:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            position.step += 1
            time.sleep(0.001)

    seen, ended = watched(moves, 0.3)
    assert ended == []
    assert seen[-1]["step"] > 0


def test_a_process_that_computes_is_not_ended(watched: Any) -> None:
    def computes(position: Position, ended: list[int]) -> None:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            sum(range(10_000))

    assert watched(computes, 0.3)[1] == []


def test_a_store_that_is_away_does_not_end_the_watch(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "EVERY", 0.02)
    ended = threading.Event()

    def refuses(rank: int, seen: dict[str, Any]) -> None:
        raise ConnectionError("the head is away")

    with Watch(Position(), 0, 0.5, refuses, lambda status: ended.set()):
        assert ended.wait(60)
