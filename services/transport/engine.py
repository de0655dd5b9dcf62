"""The core of the service: a fair, bounded queue in front of a few solver threads."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pipelines.errors import BusyError, MongeError, ServiceError, TooLargeError, TransportError
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName, solve
from services.transport.cache import PlanCache, problem_digest, same, size_of, sketch
from services.transport.fair_queue import FairQueue
from services.transport.limits import Limits
from services.transport.metrics import TransportMetrics

SMALL = 128 * 128
"""Pairs of points up to which a problem takes no longer than a hop between threads: such ones share a hop."""

BATCH = 16
"""Most problems that share a hop."""

Solve = Callable[[TransportProblem, SolverName], TransportPlan]


@dataclass(eq=False)
class _Flight:
    """A problem on its way, and all who wait for its plan."""

    problem: TransportProblem
    client: str
    solver: SolverName
    sketch: bytes | None
    size: int
    plan: asyncio.Future[TransportPlan]
    waiters: int = 0
    queued_at: float = field(default_factory=time.perf_counter)

    @property
    def pairs(self) -> int:
        n, m = self.problem.shape
        return n * m


class Engine:
    """Solves problems of many clients on a few threads.

    All state belongs to the event loop on which :meth:`submit` is awaited; threads only solve.

    Args:
        limits: what is refused.
        workers: threads that solve; the solvers' inner loops release Python's lock.
        threads: torch threads of a large problem that is solved alone; beside others, each gets one. None leaves
            torch's setting alone, for an engine in a process that is not its own.
        solver: what solves.
    """

    def __init__(
        self, limits: Limits | None = None, *, workers: int = 2, threads: int | None = None, solver: Solve = solve
    ) -> None:
        self.limits = limits or Limits()
        self.metrics = TransportMetrics(lambda: self.waiting, lambda: self._cache.bytes)
        self._workers, self._threads, self._solve = workers, threads, solver
        self._queue: FairQueue[_Flight] = FairQueue()
        self.queued_bytes = 0
        """Bytes of all that waits; see :meth:`reserve`."""
        self._flights: dict[bytes, _Flight] = {}
        self._cache = PlanCache(self.limits.cache_bytes)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="transport")
        self._running = 0
        self._pairs = 0
        """Pairs of points of all problems that wait or are being solved."""
        self._seconds_per_pair = 1e-7
        self._closed = False

    @property
    def waiting(self) -> int:
        """Problems that wait for a thread."""
        return len(self._queue)

    @property
    def load(self) -> int:
        """Problems that wait for a thread, and threads that solve."""
        return len(self._queue) + self._running

    async def submit(
        self, problem: TransportProblem, client: str = "", solver: SolverName = "auto", *, repeats: bool = True
    ) -> TransportPlan:
        """Solve a problem when its turn comes.

        Cancelling the call frees its place in the queue, unless another call waits for the same plan.

        Args:
            problem: what to solve.
            client: whose turn it uses.
            solver: a solver's name, or ``auto``.
            repeats: whether the same problem may come again; if so its plan is looked up, and kept.

        Raises:
            TooLargeError: over the limits.
            BusyError: the queue is full.
            TransportError: as of :func:`pipelines.transport.solve.solve`, or the solver broke down.
            ServiceError: the engine is closed.
        """
        problem = in_memory(problem)
        self.check(problem.shape, size_of(problem))
        flight = await self._find(problem, client, solver, repeats)
        if isinstance(flight, TransportPlan):
            return flight
        try:
            # A shield, because others may wait for the same plan.
            return await asyncio.shield(flight.plan)
        finally:
            self._leave(flight)

    def check(self, shape: tuple[int, int], size: int) -> None:
        """Refuse what is too large.

        Args:
            shape: (n, m).
            size: bytes of input.

        Raises:
            TooLargeError: naming the limit.
        """
        if max(shape) > self.limits.points:
            self.metrics.refusals.labels("TooLargeError").inc()
            raise TooLargeError(
                f"{shape[0]} × {shape[1]} points received, at most {self.limits.points} on a side are taken",
                hint="solve for fewer points, or raise the service's limit",
            )
        if size > self.limits.input_bytes:
            self.metrics.refusals.labels("TooLargeError").inc()
            raise TooLargeError(
                f"{size / 2**20:.1f} MiB of input received, at most {self.limits.input_bytes / 2**20:.1f} are taken",
                hint="send points and not their cost matrix, or fewer of them",
            )

    def reserve(self, size: int) -> None:
        """Count bytes that wait outside of the queue, as a share does for the others of its problem.

        Raises:
            BusyError: no more fit.
        """
        if self.queued_bytes + size > self.limits.queued_bytes:
            raise self.busy(f"{self.queued_bytes / 2**20:.0f} MiB of points wait")
        self.queued_bytes += size

    def release(self, size: int) -> None:
        """Undo :meth:`reserve`."""
        self.queued_bytes -= size

    async def close(self) -> None:
        """Refuse what waits, and let the threads finish what they have begun."""
        self._closed = True
        while self._queue:
            flight = self._take()
            if not flight.plan.done():
                flight.plan.set_exception(ServiceError("the transport service is shutting down"))
        await asyncio.to_thread(self._pool.shutdown)

    async def _find(
        self, problem: TransportProblem, client: str, solver: SolverName, repeats: bool
    ) -> _Flight | TransportPlan:
        """The plan of an equal problem, or an equal problem on its way, or a new flight."""
        sketched = sketch(problem, solver) if repeats and self.limits.cache_bytes else None
        if sketched is None:
            return self._depart(problem, client, solver, None)
        if self._cache.may_hold(sketched):
            plan = self._cache.get(sketched, await asyncio.to_thread(problem_digest, problem, solver))
            if plan is not None:
                self.metrics.hits.labels("kept").inc()
                return plan
        flight = self._flights.get(sketched)
        if flight is not None:
            # Joined before they are compared: meanwhile nobody may cancel it.
            flight.waiters += 1
            try:
                equal = await asyncio.to_thread(same, flight.problem, problem)
            except asyncio.CancelledError:
                self._leave(flight)
                raise
            if equal:
                self.metrics.hits.labels("in flight").inc()
                return flight
            self._leave(flight)
        return self._depart(problem, client, solver, sketched)

    def _depart(self, problem: TransportProblem, client: str, solver: SolverName, sketched: bytes | None) -> _Flight:
        if self._closed:
            raise ServiceError("the transport service is shutting down", hint="ask again in a few seconds")
        if len(self._queue) >= self.limits.queue:
            raise self.busy(f"{len(self._queue)} problems wait")
        if self._queue.waiting(client) >= self.limits.queue_per_client:
            raise self.busy(f"{self._queue.waiting(client)} problems of {client or 'this client'} wait")
        size = size_of(problem)
        self.reserve(size)
        self.metrics.misses.inc()
        flight = _Flight(problem, client, solver, sketched, size, asyncio.get_running_loop().create_future(), 1)
        if sketched is not None:
            self._flights.setdefault(sketched, flight)
        self._queue.put(client, flight)
        self._pairs += flight.pairs
        self._dispatch()
        return flight

    def _leave(self, flight: _Flight) -> None:
        flight.waiters -= 1
        if flight.waiters or flight.plan.done():
            return
        # Nobody is left to hear the answer; a thread that has begun ends on its own.
        flight.plan.cancel()
        self._forget(flight)
        if self._queue.remove(flight.client, flight):
            self.release(flight.size)
            self._pairs -= flight.pairs

    def busy(self, what: str) -> BusyError:
        """The refusal of a client for now, with the time after which there should be room."""
        self.metrics.refusals.labels("BusyError").inc()
        # Half the queue: whoever came back for the first free place would find it taken.
        seconds = 0.5 * self._pairs * self._seconds_per_pair / self._workers
        retry_after = min(max(seconds, 0.1), 60.0)
        return BusyError(
            f"the transport service is busy: {what}", hint=f"ask again in {retry_after:.1f} s", retry_after=retry_after
        )

    def _dispatch(self) -> None:
        while self._running < self._workers and self._queue and not self._closed:
            batch = [self._take()]
            while len(batch) < BATCH and self._queue and max(batch[-1].pairs, self._queue.peek().pairs) <= SMALL:
                batch.append(self._take())
            self._running += 1
            pairs = sum(flight.pairs for flight in batch)
            threads = self._threads if self._running == 1 and pairs > SMALL else 1
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._pool, self._work, loop, batch, threads)
            work.add_done_callback(partial(self._landed, pairs))

    def _take(self) -> _Flight:
        flight = self._queue.take()
        self.release(flight.size)
        return flight

    def _landed(self, pairs: int, _: object) -> None:
        self._running -= 1
        self._pairs -= pairs
        self._dispatch()

    def _work(self, loop: asyncio.AbstractEventLoop, batch: list[_Flight], threads: int | None) -> None:
        """On a solver thread: solve, and hand each plan over at once."""
        if self._threads is not None:
            # Here, because OpenMP counts threads for each thread that calls it.
            torch.set_num_threads(threads or 1)
        for flight in batch:
            if flight.plan.cancelled():
                continue
            started = time.perf_counter()
            outcome: TransportPlan | MongeError
            try:
                # Who asks has the points; here they would outlive their problem in the cache.
                outcome = self._solve(flight.problem, flight.solver).without_points()
            except MongeError as error:
                outcome = error
            except Exception as error:
                outcome = TransportError(f"the solver broke down on {flight.problem.shape}: {error!r}")
            loop.call_soon_threadsafe(self._deliver, flight, outcome, started, time.perf_counter())
            if flight.sketch is not None and isinstance(outcome, TransportPlan):
                # After delivery: nobody waits for the hash.
                printed = problem_digest(flight.problem, flight.solver)
                loop.call_soon_threadsafe(self._keep, flight, printed, outcome)

    def _deliver(self, flight: _Flight, outcome: TransportPlan | MongeError, started: float, ended: float) -> None:
        self.metrics.milliseconds.labels("queue").observe((started - flight.queued_at) * 1e3)
        self.metrics.milliseconds.labels("solve").observe((ended - started) * 1e3)
        self._seconds_per_pair += 0.2 * ((ended - started) / flight.pairs - self._seconds_per_pair)
        if isinstance(outcome, TransportPlan):
            self.metrics.solves.labels(outcome.certificate.solver).inc()
            self.metrics.gap.observe(outcome.certificate.relative_gap)
        else:
            self.metrics.failures.labels(type(outcome).__name__).inc()
            self._forget(flight)
        if flight.plan.done():
            return
        if isinstance(outcome, TransportPlan):
            flight.plan.set_result(outcome)
        else:
            flight.plan.set_exception(outcome)

    def _keep(self, flight: _Flight, printed: bytes, plan: TransportPlan) -> None:
        assert flight.sketch is not None
        self._cache.put(flight.sketch, printed, plan)
        self._forget(flight)

    def _forget(self, flight: _Flight) -> None:
        if flight.sketch is not None and self._flights.get(flight.sketch) is flight:
            del self._flights[flight.sketch]


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def in_memory(problem: TransportProblem) -> TransportProblem:
    """The same problem with its tensors as NumPy arrays in main memory, shared where they are there already."""
    arrays: dict[str, Any] = {
        name: part.detach().cpu().numpy()
        for name in ("x", "y", "matrix")
        if isinstance(part := getattr(problem, name), torch.Tensor)
    }
    return replace(problem, **arrays) if arrays else problem


def flat(points: torch.Tensor | np.ndarray) -> np.ndarray:
    """Points as a (k, d) array in main memory, in their own type of number: uint8 images cross as bytes."""
    if isinstance(points, torch.Tensor):
        points = points.detach().cpu()
        points = (points.float() if points.dtype == torch.bfloat16 else points).numpy()
    return np.ascontiguousarray(points.reshape(len(points), -1))
