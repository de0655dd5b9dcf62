"""How ranks agree on the step after which they stop, once one of them is asked to."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pipelines.distributed import rank, reduce_over_ranks

EVERY = 0.5
"""Seconds between two questions, about: each is a message between all ranks."""

MOST_STEPS = 10_000
"""Steps between two questions at most."""


class Stopping:
    """Asks all ranks now and then, at steps that they know beforehand, and tells all of them whether one said yes.

    Args:
        asked: whether this rank was asked to stop.
        clock: seconds.
    """

    def __init__(self, asked: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._asked, self._clock = asked, clock
        self._next = 0
        self._last: tuple[int, float] | None = None

    def after(self, step: int) -> bool:
        """Whether all ranks stop after this step; every rank calls it after every step."""
        if step < self._next:
            return False
        answer = torch.tensor([int(self._asked()), self._interval(step) if rank() == 0 else 0])
        stops, interval = reduce_over_ranks(answer, "max").tolist()
        self._next = step + interval
        return bool(stops)

    def _interval(self, step: int) -> int:
        """Steps until the next question, from the time that the last ones took."""
        now, last = self._clock(), self._last
        self._last = step, now
        if last is None:
            return 1
        steps, seconds = step - last[0], now - last[1]
        return max(1, min(MOST_STEPS, round(steps * EVERY / max(seconds, 1e-9)), 10 * steps))
