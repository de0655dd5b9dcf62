"""The buffer between training and the tracking server."""

import threading
import time

import pytest

from services.tracking.outbox import Outbox


class AwayError(Exception):
    """The server is not available."""


class Server:
    """Accepts batches, or rejects them while ``failure`` is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.failure: Exception | None = None
        self.calls = 0

    def __call__(self, batch: list[int]) -> None:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        self.batches.append(batch)

    @property
    def items(self) -> list[int]:
        return [item for batch in self.batches for item in batch]


def outbox_to(server: Server, **options: object) -> Outbox[int]:
    return Outbox(server, lambda error: isinstance(error, AwayError), **options)  # type: ignore[arg-type]


def test_everything_arrives_in_order_and_in_batches() -> None:
    server = Server()
    outbox = outbox_to(server, batch=100)
    for item in range(1000):
        outbox.put(item)
    assert outbox.close(timeout=10) is None
    assert server.items == list(range(1000))
    assert max(map(len, server.batches)) <= 100
    assert len(server.batches) <= 20


def test_put_does_not_wait_for_a_slow_server() -> None:
    sending, proceed = threading.Event(), threading.Event()

    def slow(batch: list[int]) -> None:
        nonlocal sent
        sending.set()
        assert proceed.wait(60)
        sent += len(batch)

    sent = 0
    outbox: Outbox[int] = Outbox(slow, lambda error: True, interval=0.01)
    outbox.put(0)
    assert sending.wait(10)
    for item in range(1000):
        outbox.put(item)
    assert sent == 0, "the server has not answered yet"
    proceed.set()
    assert outbox.close(timeout=10) is None


def test_what_was_put_while_the_server_was_away_is_sent_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.failure = AwayError("refused")
    outbox = outbox_to(server, interval=0.01)
    for item in range(10):
        outbox.put(item)
    while server.calls < 2:
        failure = outbox.flush(timeout=0.5)
    assert isinstance(failure, AwayError)
    assert sum("unreachable" in record.message for record in caplog.records) == 1
    server.failure = None
    assert outbox.close(timeout=10) is None
    assert server.items == list(range(10))
    assert outbox.dropped == 0


def test_the_oldest_give_way_when_the_server_stays_away() -> None:
    server = Server()
    server.failure = AwayError("refused")
    outbox = outbox_to(server, capacity=10)
    for item in range(25):
        outbox.put(item)
    outbox.flush(timeout=0.6)
    server.failure = None
    outbox.close(timeout=10)
    assert server.items == list(range(15, 25))
    assert outbox.dropped == 15


def test_what_can_never_be_sent_is_dropped_and_does_not_hold_up_the_rest() -> None:
    server = Server()
    server.failure = ValueError("no such metric")
    outbox = outbox_to(server)
    outbox.put(1)
    assert outbox.flush(timeout=10) is None
    server.failure = None
    outbox.put(2)
    assert outbox.close(timeout=10) is None
    assert server.items == [2]
    assert outbox.dropped == 1


def test_items_that_do_not_join_are_sent_alone() -> None:
    server = Server()
    outbox = outbox_to(server, joins=lambda item: item < 100)
    for item in (1, 2, 100, 101, 3):
        outbox.put(item)
    outbox.close(timeout=10)
    assert server.batches == [[1, 2], [100], [101], [3]]


def test_closing_does_not_wait_longer_than_it_may() -> None:
    server = Server()
    server.failure = AwayError("refused")
    outbox = outbox_to(server)
    outbox.put(1)
    start = time.monotonic()
    assert isinstance(outbox.close(timeout=0.3), AwayError)
    assert time.monotonic() - start < 5


def test_a_tick_that_fails_does_not_end_the_thread() -> None:
    server = Server()
    ticked = threading.Event()

    def tick() -> None:
        ticked.set()
        raise RuntimeError("no sensors")

    outbox = outbox_to(server, tick=tick, interval=0.01)
    outbox.put(1)
    assert ticked.wait(10)
    assert outbox.close(timeout=10) is None
    assert server.items == [1]
