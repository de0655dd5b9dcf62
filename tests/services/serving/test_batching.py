"""The queue that batches concurrent requests."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from pipelines.errors import BusyError
from services.serving.batching import MicroBatcher


class Doubler:
    """Doubles the first pixel of every image; can be blocked, or configured to fail."""

    def __init__(self) -> None:
        self.started, self.proceed = threading.Event(), threading.Event()
        self.proceed.set()
        self.sizes: list[int] = []
        self.failure: Exception | None = None

    def decode(self, images: Sequence[bytes] | np.ndarray) -> np.ndarray:
        if isinstance(images, np.ndarray):
            return images
        return np.array([int(text) for text in images], np.uint8).reshape(-1, 1, 1, 1)

    def predict(self, images: np.ndarray) -> np.ndarray:
        self.started.set()
        assert self.proceed.wait(10)
        self.sizes.append(len(images))
        if self.failure is not None:
            raise self.failure
        return 2.0 * images[:, 0, 0]


async def start_and_hold(batcher: MicroBatcher, doubler: Doubler) -> asyncio.Task[np.ndarray]:
    """Start a first request that blocks the thread, so that the next requests queue."""
    doubler.proceed.clear()
    first = asyncio.create_task(batcher.predict(doubler, [b"1"]))
    assert await asyncio.to_thread(doubler.started.wait, 10)
    return first


def test_requests_that_wait_become_one_batch_and_get_their_own_rows() -> None:
    async def scenario() -> None:
        batcher, doubler = MicroBatcher(), Doubler()
        first = await start_and_hold(batcher, doubler)
        others = [asyncio.create_task(batcher.predict(doubler, [b"2", b"3"])) for _ in range(5)]
        await asyncio.sleep(0)
        assert batcher.queued == 10
        doubler.proceed.set()
        assert (await first).tolist() == [[2]]
        assert [row.tolist() for row in await asyncio.gather(*others)] == [[[4], [6]]] * 5
        assert doubler.sizes == [1, 10]
        assert batcher.queued == 0
        batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_batches_have_a_limit_and_larger_requests_are_split() -> None:
    async def scenario() -> None:
        batcher, doubler = MicroBatcher(max_batch=4), Doubler()
        first = await start_and_hold(batcher, doubler)
        others = [asyncio.create_task(batcher.predict(doubler, [b"2"] * 3)) for _ in range(2)]
        large = asyncio.create_task(batcher.predict(doubler, np.full((9, 1, 1, 1), 5, np.uint8)))
        await asyncio.sleep(0)
        doubler.proceed.set()
        await asyncio.gather(first, *others)
        assert (await large).tolist() == [[10]] * 9
        assert doubler.sizes == [1, 3, 3, 4, 4, 1]
        batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_one_bad_request_does_not_touch_its_neighbours() -> None:
    async def scenario() -> None:
        batcher, doubler = MicroBatcher(), Doubler()
        first = await start_and_hold(batcher, doubler)
        bad = asyncio.create_task(batcher.predict(doubler, [b"two"]))
        good = asyncio.create_task(batcher.predict(doubler, [b"3"]))
        await asyncio.sleep(0)
        doubler.proceed.set()
        await first
        with pytest.raises(ValueError, match="two"):
            await bad
        assert (await good).tolist() == [[6]]
        batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_network_that_fails_fails_its_batch_only() -> None:
    async def scenario() -> None:
        batcher, broken, whole = MicroBatcher(), Doubler(), Doubler()
        first = await start_and_hold(batcher, broken)
        broken.failure = RuntimeError("out of memory")
        other = asyncio.create_task(batcher.predict(whole, [b"4"]))
        await asyncio.sleep(0)
        broken.proceed.set()
        with pytest.raises(RuntimeError, match="memory"):
            await first
        assert (await other).tolist() == [[8]]
        batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_full_queue_refuses_and_a_client_that_goes_is_forgotten() -> None:
    async def scenario() -> None:
        batcher, doubler = MicroBatcher(max_queued=4), Doubler()
        first = await start_and_hold(batcher, doubler)
        waiting = asyncio.create_task(batcher.predict(doubler, [b"1"] * 4))
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="4 images"):
            await batcher.predict(doubler, [b"1"])
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert batcher.queued == 0, "its place is free while the thread still works on the first"
        last = asyncio.create_task(batcher.predict(doubler, [b"7"] * 4))
        doubler.proceed.set()
        assert (await first).tolist() == [[2]]
        assert (await last).tolist() == [[14]] * 4
        assert doubler.sizes == [1, 4]
        batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_closing_cancels_what_waits() -> None:
    async def scenario() -> None:
        batcher, doubler = MicroBatcher(), Doubler()
        first = await start_and_hold(batcher, doubler)
        waiting = asyncio.create_task(batcher.predict(doubler, [b"1"]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        doubler.proceed.set()
        await asyncio.gather(first, closing)
        # Taken into a last batch, or cancelled; never left to wait for ever.
        (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError | np.ndarray)
        with pytest.raises(BusyError):
            await batcher.predict(doubler, [b"1"])

    asyncio.run(asyncio.wait_for(scenario(), 20))
