"""A buffer between a training loop that must not wait and a server that may be slow or away."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")

log = logging.getLogger(__name__)


class Outbox(Generic[Item]):
    """Items put on any thread are sent in batches, in order, by one background thread.

    A batch whose sending fails for now is kept and tried again, ever more rarely; one that can never succeed is
    dropped. Both are reported once, not once a batch.

    Args:
        send: sends a batch; called on the background thread only.
        is_passing: whether an error of ``send`` may go away by itself.
        joins: whether an item may share a call of ``send`` with its neighbours; others are sent alone, so that what
            cannot be sent twice is not sent again on account of its neighbours.
        tick: called on the background thread every ``interval`` seconds, before what is due is sent.
        interval: seconds that an item may wait for others to share its batch.
        capacity: items kept while the server is away; the oldest give way to the newest.
        batch: most items in one call of ``send``.
    """

    def __init__(
        self,
        send: Callable[[list[Item]], None],
        is_passing: Callable[[BaseException], bool],
        joins: Callable[[Item], bool] = lambda _: True,
        tick: Callable[[], None] = lambda: None,
        interval: float = 2.0,
        capacity: int = 20_000,
        batch: int = 1_000,
    ) -> None:
        self._send, self._is_passing, self._joins, self._tick = send, is_passing, joins, tick
        self._interval, self._capacity, self._batch = interval, capacity, batch
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._sending: list[Item] = []
        self._hurry = False
        self._closing = False
        self._refused = False
        self._failure: BaseException | None = None
        self.dropped = 0
        """Items that were lost: refused for good, or pushed out while the server was away."""
        self._thread = threading.Thread(target=self._run, name="tracking-outbox", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand over an item; returns at once."""
        with self._changed:
            if len(self._items) >= self._capacity:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)

    def flush(self, timeout: float) -> BaseException | None:
        """Wait until everything put so far is sent.

        Returns:
            None, or what stood in the way for ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._items or self._sending:
                left = deadline - time.monotonic()
                if left <= 0:
                    return self._failure or TimeoutError(f"still sending after {timeout:g} s")
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._items and not self._sending, min(left, 0.5))
            return None

    def close(self, timeout: float) -> BaseException | None:
        """Flush, then end the thread; where something is left, the thread goes on. See :meth:`flush`."""
        failure = self.flush(timeout)
        if failure is not None:
            return failure
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=5)
        return None

    def waiting(self) -> list[Item]:
        """Items not yet sent, in order; the first ones may be on their way."""
        with self._changed:
            return [*self._sending, *self._items]

    def __len__(self) -> int:
        """Items not yet sent."""
        return len(self._items) + len(self._sending)

    def _run(self) -> None:
        wait = self._interval
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._hurry or self._closing, wait)
                if self._closing:
                    return
                self._hurry = False
            try:
                self._tick()
            except Exception as error:
                log.debug("tick failed: %s", error)
            wait = self._interval if self._send_all() else min(2 * wait, 30.0)

    def _send_all(self) -> bool:
        """Send until nothing is left; False when the server is away."""
        while True:
            with self._changed:
                due = self._next()
                if not due:
                    self._recovered()
                    return True
                self._sending = due
            failure = None
            try:
                self._send(due)
            except Exception as error:  # whatever it is, training goes on
                failure = error
            with self._changed:
                self._sending = []
                if failure is not None and self._is_passing(failure):
                    # Back to the front, as many as the newest left room for.
                    room = max(0, self._capacity - len(self._items))
                    self.dropped += max(0, len(due) - room)
                    self._items.extendleft(reversed(due[len(due) - min(room, len(due)) :]))
                    self._away(failure)
                    return False
                if failure is not None:
                    self._refuse(len(due), failure)
                self._changed.notify_all()

    def _next(self) -> list[Item]:
        due: list[Item] = []
        while self._items and len(due) < self._batch and (not due or self._joins(self._items[0])):
            due.append(self._items.popleft())
            if not self._joins(due[0]):
                break
        return due

    def _away(self, failure: BaseException) -> None:
        if self._failure is None:
            log.warning("tracking is away, training goes on and what it logs is kept: %s", failure)
        self._failure = failure

    def _recovered(self) -> None:
        if self._failure is not None:
            log.warning("tracking is back")
        self._failure = None
        self._changed.notify_all()

    def _refuse(self, count: int, failure: BaseException) -> None:
        self.dropped += count
        if not self._refused:
            log.warning("tracking refused %d items for good: %s", count, failure)
        self._refused = True
