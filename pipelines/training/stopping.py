"""Lets all ranks stop after the same step when one of them is asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pipelines.distributed import rank, reduce_over_ranks

EVERY = 0.5
"""Approximate seconds between two checks; each is an all-reduce."""

MOST_STEPS = 10_000
"""Maximum number of steps between two checks."""


class Stopping:
    """Checks at steps that all ranks agree on in advance whether any rank was asked to stop.

    Args:
        asked: whether this rank was asked to stop.
        clock: returns the time in seconds.
    """

    def __init__(self, asked: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._asked, self._clock = asked, clock
        self._next = 0
        self._last: tuple[int, float] | None = None

    def after(self, step: int) -> bool:
        """Whether all ranks stop after this step. Collective: every rank calls it after every step."""
        if step < self._next:
            return False
        answer = torch.tensor([int(self._asked()), self._interval(step) if rank() == 0 else 0])
        stops, interval = reduce_over_ranks(answer, "max").tolist()
        self._next = step + interval
        return bool(stops)

    def _interval(self, step: int) -> int:
        """Steps until the next check, estimated from the duration of the last ones."""
        now, last = self._clock(), self._last
        self._last = step, now
        if last is None:
            return 1
        steps, seconds = step - last[0], now - last[1]
        return max(1, min(MOST_STEPS, round(steps * EVERY / max(seconds, 1e-9)), 10 * steps))
