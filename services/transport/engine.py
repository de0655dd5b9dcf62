"""Core of the transport service: a fair, bounded queue and a few solver threads."""

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
"""Number of pairs of points up to which solving takes no longer than a thread switch; such problems are batched."""

BATCH = 16
"""Maximum number of problems in a batch."""

Solve = Callable[[TransportProblem, SolverName], TransportPlan]


@dataclass(eq=False)
class _Flight:
    """A problem being solved, and all calls that wait for its plan."""

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
        limits: limits on requests.
        workers: number of solver threads; the solvers' inner loops release the GIL.
        threads: number of torch threads for a large problem that is solved alone; with others in parallel, each gets
            one. None keeps torch's setting, for an engine in a process with other work.
        solver: solver function.
    """

    def __init__(
        self, limits: Limits | None = None, *, workers: int = 2, threads: int | None = None, solver: Solve = solve
    ) -> None:
        self.limits = limits or Limits()
        self.metrics = TransportMetrics(lambda: self.waiting, lambda: self._cache.bytes)
        self._workers, self._threads, self._solve = workers, threads, solver
        self._queue: FairQueue[_Flight] = FairQueue()
        self.queued_bytes = 0
        """Bytes of all waiting problems; see :meth:`reserve`."""
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
        """Number of problems that wait for a thread."""
        return len(self._queue)

    @property
    def load(self) -> int:
        """Number of problems that wait for a thread, plus busy threads."""
        return len(self._queue) + self._running

    async def submit(
        self, problem: TransportProblem, client: str = "", solver: SolverName = "auto", *, repeats: bool = True
    ) -> TransportPlan:
        """Queue a problem and return its plan.

        Cancelling the call frees its place in the queue, unless another call waits for the same plan.

        Args:
            problem: problem to solve.
            client: name of the client whose turn it uses.
            solver: name of a solver, or ``auto``.
            repeats: whether the same problem may be repeated; if so, the cache is used.

        Raises:
            TooLargeError: the problem exceeds the limits.
            BusyError: the queue is full.
            TransportError: see :func:`pipelines.transport.solve.solve`; or the solver crashed.
            ServiceError: the engine is closed.
        """
        problem = in_memory(problem)
        self.check(problem.shape, size_of(problem))
        flight = await self._find(problem, client, solver, repeats)
        if isinstance(flight, TransportPlan):
            return flight
        try:
            # Shielded, because other calls may wait for the same plan.
            return await asyncio.shield(flight.plan)
        finally:
            self._leave(flight)

    def check(self, shape: tuple[int, int], size: int) -> None:
        """Raise if a problem is too large.

        Args:
            shape: shape of the problem, (n, m).
            size: size of the input in bytes.

        Raises:
            TooLargeError: the problem exceeds a limit, which the message names.
        """
        if max(shape) > self.limits.points:
            self.metrics.refusals.labels("TooLargeError").inc()
            raise TooLargeError(
                f"received {shape[0]} × {shape[1]} points, the maximum is {self.limits.points} per side",
                hint="use fewer points, or raise the service's limit",
            )
        if size > self.limits.input_bytes:
            self.metrics.refusals.labels("TooLargeError").inc()
            raise TooLargeError(
                f"received {size / 2**20:.1f} MiB of input, the maximum is {self.limits.input_bytes / 2**20:.1f} MiB",
                hint="send points instead of a cost matrix, or fewer points",
            )

    def reserve(self, size: int) -> None:
        """Count bytes that wait outside the queue, such as shares that wait for other ranks.

        Raises:
            BusyError: the limit is reached.
        """
        if self.queued_bytes + size > self.limits.queued_bytes:
            raise self.busy(f"{self.queued_bytes / 2**20:.0f} MiB of points waiting")
        self.queued_bytes += size

    def release(self, size: int) -> None:
        """Undo :meth:`reserve`."""
        self.queued_bytes -= size

    async def close(self) -> None:
        """Reject waiting problems, and let the threads finish their current ones."""
        self._closed = True
        while self._queue:
            flight = self._take()
            if not flight.plan.done():
                flight.plan.set_exception(ServiceError("the transport service is shutting down"))
        await asyncio.to_thread(self._pool.shutdown)

    async def _find(
        self, problem: TransportProblem, client: str, solver: SolverName, repeats: bool
    ) -> _Flight | TransportPlan:
        """Return a cached plan, an equal problem in progress, or a new flight."""
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
            # Join before comparing, so that it is not cancelled in between.
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
            raise ServiceError("the transport service is shutting down", hint="retry in a few seconds")
        if len(self._queue) >= self.limits.queue:
            raise self.busy(f"{len(self._queue)} problems waiting")
        if self._queue.waiting(client) >= self.limits.queue_per_client:
            raise self.busy(f"{self._queue.waiting(client)} problems of {client or 'this client'} waiting")
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
        # No call waits for the result; a thread that has started finishes by itself.
        flight.plan.cancel()
        self._forget(flight)
        if self._queue.remove(flight.client, flight):
            self.release(flight.size)
            self._pairs -= flight.pairs

    def busy(self, what: str) -> BusyError:
        """Return an error that asks a client to retry after a time in which the queue should shrink."""
        self.metrics.refusals.labels("BusyError").inc()
        # Half of the queue: after a shorter time, the first free place would be taken again.
        seconds = 0.5 * self._pairs * self._seconds_per_pair / self._workers
        retry_after = min(max(seconds, 0.1), 60.0)
        return BusyError(
            f"the transport service is busy: {what}", hint=f"retry in {retry_after:.1f} s", retry_after=retry_after
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
        """Solve a batch on a solver thread, and deliver each plan at once."""
        if self._threads is not None:
            # Set here, because OpenMP counts threads per calling thread.
            torch.set_num_threads(threads or 1)
        for flight in batch:
            if flight.plan.cancelled():
                continue
            started = time.perf_counter()
            outcome: TransportPlan | MongeError
            try:
                # The caller has the points; here they would be kept in the cache.
                outcome = self._solve(flight.problem, flight.solver).without_points()
            except MongeError as error:
                outcome = error
            except Exception as error:
                outcome = TransportError(f"the solver crashed on a problem of shape {flight.problem.shape}: {error!r}")
            loop.call_soon_threadsafe(self._deliver, flight, outcome, started, time.perf_counter())
            if flight.sketch is not None and isinstance(outcome, TransportPlan):
                # After delivery, so that no call waits for the hash.
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
    """Return the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def in_memory(problem: TransportProblem) -> TransportProblem:
    """Return the problem with its tensors as NumPy arrays in main memory, without copies if they are there already."""
    arrays: dict[str, Any] = {
        name: part.detach().cpu().numpy()
        for name in ("x", "y", "matrix")
        if isinstance(part := getattr(problem, name), torch.Tensor)
    }
    return replace(problem, **arrays) if arrays else problem


def flat(points: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return points as a (k, d) array in main memory with their dtype: uint8 images are sent as bytes."""
    if isinstance(points, torch.Tensor):
        points = points.detach().cpu()
        points = (points.float() if points.dtype == torch.bfloat16 else points).numpy()
    return np.ascontiguousarray(points.reshape(len(points), -1))
