"""Micro-batching: concurrent requests share one forward pass.

One thread decodes images and predicts, to keep the event loop free. Requests that arrive meanwhile form the next
batch: batches grow with the load, and a single request never waits for others.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from pipelines.errors import BusyError


class Predictor(Protocol):
    """Predicts batches; requests for the same predictor share batches."""

    def decode(self, images: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Return (k, c, h, w) uint8 from encoded images or from a tensor."""

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return (b, classes) probabilities of (b, c, h, w) uint8."""


@dataclass(eq=False)
class _Job:
    predictor: Predictor
    images: Sequence[bytes] | np.ndarray
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[np.ndarray]
    pixels: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))


class MicroBatcher:
    """A queue of predict requests and the thread that handles them.

    Args:
        max_batch: maximum number of images in a forward pass.
        max_queued: maximum number of waiting images; beyond that :class:`BusyError`.
        threads: number of torch threads for a forward pass.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        max_batch: int = 256,
        max_queued: int = 4096,
        threads: int = 1,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._max_batch, self._max_queued = max_batch, max_queued
        self._threads, self._on_batch = threads, on_batch
        self._jobs: deque[_Job] = deque()
        self._queued = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="micro-batcher", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Number of waiting images."""
        return self._queued

    async def predict(self, predictor: Predictor, images: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Return probabilities, (k, classes) float32, of k encoded images or of a (k, c, h, w) uint8 tensor.

        Raises:
            BusyError: too many images are waiting.
            Exception: the predictor fails on these images; other requests in the batch are not affected.
        """
        loop = asyncio.get_running_loop()
        job = _Job(predictor, images, loop, loop.create_future())
        with self._changed:
            if self._closed or (self._jobs and self._queued + len(images) > self._max_queued):
                raise BusyError(f"{self._queued} images are already waiting", hint="retry in a second")
            self._jobs.append(job)
            self._queued += len(images)
            self._changed.notify()
        try:
            return await job.answer
        except asyncio.CancelledError:
            self._withdraw(job)
            raise

    def close(self) -> None:
        """Stop the thread and cancel waiting requests."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _withdraw(self, job: _Job) -> None:
        """Remove the request of a client that has disconnected."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._queued -= len(job.images)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while jobs := self._next_batch():
            for predictor in dict.fromkeys(job.predictor for job in jobs):
                self._answer(predictor, [job for job in jobs if job.predictor is predictor])

    def _next_batch(self) -> list[_Job]:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            jobs: list[_Job] = []
            size = 0
            while self._jobs and (not jobs or size + len(self._jobs[0].images) <= self._max_batch):
                jobs.append(self._jobs.popleft())
                size += len(jobs[-1].images)
            self._queued -= size
            if self._closed:
                for job in [*jobs, *self._jobs]:
                    job.loop.call_soon_threadsafe(job.answer.cancel)
                return []
            return jobs

    def _answer(self, predictor: Predictor, jobs: list[_Job]) -> None:
        outcomes: list[tuple[_Job, Any]] = []
        readable: list[_Job] = []
        for job in jobs:
            try:
                job.pixels = predictor.decode(job.images)
                readable.append(job)
            except Exception as error:
                outcomes.append((job, error))
        if readable:
            try:
                images = np.concatenate([job.pixels for job in readable])
                self._on_batch(len(images))
                rows = np.concatenate(
                    [
                        predictor.predict(images[start : start + self._max_batch])
                        for start in range(0, len(images), self._max_batch)
                    ]
                )
                ends = np.cumsum([len(job.pixels) for job in readable])
                outcomes += zip(readable, np.split(rows, ends[:-1]), strict=True)
            except Exception as error:
                outcomes += [(job, error) for job in readable]
        # One callback on the event loop for the whole batch.
        for loop in {job.loop for job, _ in outcomes}:
            loop.call_soon_threadsafe(_settle, [(job.answer, o) for job, o in outcomes if job.loop is loop])


def _settle(outcomes: list[tuple[asyncio.Future[np.ndarray], Any]]) -> None:
    for answer, outcome in outcomes:
        if answer.done():  # the client has disconnected
            continue
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)
