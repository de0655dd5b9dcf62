"""Buffer between a training loop, which must not wait, and a server that may be slow or unreachable."""

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
    """Sends items in batches, in order, in a background thread.

    A batch that fails with a temporary error is kept and retried with increasing pauses; one that fails permanently is
    dropped. Each condition is logged once, not for every batch.

    Args:
        send: function that sends a batch; called on the background thread only.
        is_passing: function that tells whether an error of ``send`` is temporary.
        joins: function that tells whether an item may share a batch; others are sent alone, so that a failed batch does
            not send them twice.
        tick: called on the background thread every ``interval`` seconds, before sending.
        interval: maximum seconds that an item waits for others to fill its batch.
        capacity: maximum number of items kept while the server is unreachable; the oldest are dropped first.
        batch: maximum number of items in a batch.
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
        """Number of lost items: rejected permanently, or dropped while the server was unreachable."""
        self._thread = threading.Thread(target=self._run, name="tracking-outbox", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Add an item; returns at once."""
        with self._changed:
            if len(self._items) >= self._capacity:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)

    def flush(self, timeout: float) -> BaseException | None:
        """Wait until all items are sent.

        Returns:
            None, or the error that persisted for ``timeout`` seconds.
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
        """Flush, then stop the thread; if items remain, the thread continues. See :meth:`flush`."""
        failure = self.flush(timeout)
        if failure is not None:
            return failure
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=5)
        return None

    def waiting(self) -> list[Item]:
        """Return the items not yet sent, in order; the first ones may be in progress."""
        with self._changed:
            return [*self._sending, *self._items]

    def __len__(self) -> int:
        """Return the number of items not yet sent."""
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
        """Send all items; return False if the server is unreachable."""
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
            except Exception as error:  # no error may stop the training
                failure = error
            with self._changed:
                self._sending = []
                if failure is not None and self._is_passing(failure):
                    # Put back at the front, as many as fit.
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
            log.warning("tracking is unreachable; training continues and keeps its log entries: %s", failure)
        self._failure = failure

    def _recovered(self) -> None:
        if self._failure is not None:
            log.warning("tracking is reachable again")
        self._failure = None
        self._changed.notify_all()

    def _refuse(self, count: int, failure: BaseException) -> None:
        self.dropped += count
        if not self._refused:
            log.warning("tracking rejected %d items: %s", count, failure)
        self._refused = True
