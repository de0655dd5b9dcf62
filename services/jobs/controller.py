"""Control loop of the job service: read the cluster, ask the policy for actions, and execute them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from services.jobs import policy
from services.jobs.attempt_logs import AttemptLogs
from services.jobs.policy import Cluster, EndAttempt, Move, SchedulingLimits, Send, Start, Stop
from services.jobs.ray_jobs import EngineError, RayNode, RayStatus, RefusedError
from services.jobs.states import AttemptStatus, State
from services.jobs.store import JobStore, Untracked
from services.training.progress import read_event

INTERVAL = 0.5
"""Maximum seconds between two passes if nothing requests one earlier."""

IDLE = 4.0
"""Pause after a pass, as a multiple of its duration and at most ``INTERVAL``, in which API requests have precedence."""

LOG_PATIENCE = 10.0
"""Seconds after the end of an attempt within which the rest of its log must arrive."""

SENDS = 5
"""Number of times that the cluster may reject an attempt."""

log = logging.getLogger(__name__)

Track = Callable[[Untracked], None]
"""Marks the state of a job in MLflow; raises if MLflow is unreachable."""


class JobRunner(Protocol):
    """Runs attempts; see :class:`services.jobs.ray_jobs.RayJobs`."""

    async def look(self) -> tuple[Cluster, list[RayNode]]:
        """Return the resources and nodes of the cluster."""
        ...

    async def status(self, attempt: str) -> RayStatus:
        """Return the status of an attempt."""
        ...

    async def submit(self, attempt: str, entrypoint: str, metadata: Mapping[str, str]) -> None:
        """Start an attempt; starting it twice has no effect."""
        ...

    async def stop(self, attempt: str) -> None:
        """Ask an attempt to stop."""
        ...

    async def log(self, attempt: str) -> str:
        """Return the whole log of an attempt."""
        ...

    def tail(self, attempt: str) -> AsyncIterator[str]:
        """Yield the log of an attempt as it is written."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """The latest state of the cluster that the controller has read."""

    cluster: Cluster
    nodes: Sequence[RayNode] = ()


@dataclass(frozen=True)
class Launch:
    """Parameters of the command that starts a driver on the cluster.

    Attributes:
        python: Python that runs the driver.
        home: value of ``MONGE_HOME`` for the driver; if None, that of its machine.
    """

    python: str = "python"
    home: Path | None = None

    def entrypoint(self, job: str, attempt: int, workers: int, spec: str, origin: str | None = None) -> str:
        """Return the command line of an attempt."""
        environment = [] if self.home is None else ["env", f"MONGE_HOME={self.home}"]
        driver = ["-m", "services.jobs.driver", "--job", job, "--attempt", str(attempt)]
        driver += ["--workers", str(workers), "--spec", spec]
        driver += [] if origin is None else ["--from", origin]
        # `exec` replaces the shell: Ray waits for this process. If a shell ended before the driver, the driver would
        # continue unobserved.
        return "exec " + shlex.join([*environment, self.python, *driver])


class Controller:
    """Controller of the jobs of a store. Run one per store: a second one would corrupt the logs.

    Args:
        store: persistent state of the service.
        runner: starts and observes attempts.
        logs: logs of the jobs.
        launch: parameters of the command that starts drivers.
        limits: limits on running jobs.
        track: marks the state of a job in MLflow.
    """

    def __init__(
        self,
        store: JobStore,
        runner: JobRunner,
        logs: AttemptLogs,
        launch: Launch,
        limits: SchedulingLimits,
        track: Track,
    ) -> None:
        self._store, self._runner, self._logs, self._launch = store, runner, logs, launch
        self._limits, self._track = limits, track
        self._tails: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._ended_since: dict[tuple[str, int], float] = {}
        self._refusals: dict[tuple[str, int], int] = {}
        self._tracking: asyncio.Task[None] | None = None
        self.seen = Snapshot(Cluster(away="not contacted yet"))
        self.looked = 0.0
        """Time of the last completed pass, by the monotonic clock."""

    async def run(self, stop: asyncio.Event, poked: asyncio.Event) -> None:
        """Run passes until ``stop`` is set; the next one starts at once if ``poked`` is set."""
        while not stop.is_set():
            poked.clear()
            started = time.monotonic()
            try:
                await self.step()
            except Exception:
                log.exception("a pass of the controller failed")
            await asyncio.sleep(min(INTERVAL, IDLE * (time.monotonic() - started)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(poked.wait(), INTERVAL)
        for task in [*self._tails.values(), *([self._tracking] if self._tracking else [])]:
            task.cancel()
        await asyncio.gather(*self._tails.values(), return_exceptions=True)
        await self._runner.close()

    async def step(self) -> None:
        """Run one pass: read the cluster and execute the next actions."""
        cluster, nodes = await self._runner.look()
        jobs = self._store.unfinished()
        statuses: dict[str, RayStatus] = {}
        if not cluster.away:
            try:
                statuses = await self._statuses(jobs)
            except EngineError as error:
                cluster = Cluster(away=str(error))
        self.seen = Snapshot(cluster, nodes)
        jobs = [await self._informed(job, statuses.get(job.id)) for job in jobs]
        limits = replace(self._limits, draining=self._store.draining)
        actions = policy.decide(jobs, cluster, time.time(), limits)
        by_id = {job.id: job for job in jobs}
        for action in actions:
            if not isinstance(action, Move):
                await self._carry_out(action, by_id[action.job])
        if moves := [action for action in actions if isinstance(action, Move)]:
            self._store.move(moves)
        self._begin_tracking()
        self.looked = time.monotonic()

    async def _statuses(self, jobs: Sequence[policy.JobView]) -> dict[str, RayStatus]:
        """Return the status of each attempt that was sent to the cluster."""
        asked = [job for job in jobs if job.attempt is not None]
        found = await asyncio.gather(*(self._runner.status(attempt_id(job)) for job in asked))
        return {job.id: status for job, status in zip(asked, found, strict=True)}

    async def _informed(self, job: policy.JobView, status: RayStatus | None) -> policy.JobView:
        """Return the job with the status of its attempt on the cluster, after all of the attempt's log was read."""
        attempt = job.attempt
        if attempt is None:
            return job
        key = job.id, attempt.number
        if status is None:
            return job
        if status.status is not AttemptStatus.UNKNOWN and not attempt.sent:
            self._store.sent(job.id)  # the response to the request was lost
            attempt = replace(attempt, sent=True)
        if attempt.sent and status.status not in (AttemptStatus.PENDING, AttemptStatus.UNKNOWN):
            self._follow(key)
        if status.status.ended and attempt.sent:
            if not await self._is_read(key, status):
                return replace(job, attempt=replace(attempt, status=None))
            attempt = self._store.open_attempt(job.id)  # includes all events from its log
        died = "its driver died" + (f": {first}" if (first := _first_line(status.message)) else "")
        attempt = replace(attempt, status=status.status, message=attempt.message or died)
        return replace(job, attempt=attempt)

    def _follow(self, key: tuple[str, int]) -> None:
        if key not in self._tails:
            self._tails[key] = asyncio.create_task(self._tail(*key))

    async def _is_read(self, key: tuple[str, int], status: RayStatus) -> bool:
        """Return whether the log of an attempt that has ended was read completely."""
        if status.status is AttemptStatus.UNKNOWN:
            return True
        since = self._ended_since.setdefault(key, time.monotonic())
        tail = self._tails[key]
        if not tail.done() and time.monotonic() - since < LOG_PATIENCE:
            return False
        tail.cancel()
        with contextlib.suppress(EngineError):
            rest = (await self._runner.log(_attempt_id(*key))).encode()[self._logs.size(*key) :]
            # The last line of a killed driver may lack a newline.
            self._take(*key, rest)
            self._take(*key, b"\n" * (not self._logs.is_whole(*key)))
        return True

    async def _tail(self, job: str, number: int) -> None:
        """Copy the log of an attempt, from the end of the previous copy."""
        while True:
            skip = self._logs.size(job, number)
            try:
                async for text in self._runner.tail(_attempt_id(job, number)):
                    content = text.encode()
                    content, skip = content[skip:], max(0, skip - len(content))
                    self._take(job, number, content)
                return
            except EngineError as error:
                log.info("the log of %s was interrupted: %s", job, error)
                await asyncio.sleep(INTERVAL)

    def _take(self, job: str, number: int, content: bytes) -> None:
        """Store a part of a log and the events in it."""
        if content:
            self._logs.append(job, number, content)
        start = self._store.read_of(job, number)
        while True:
            lines, end = self._logs.lines(job, number, start)
            if end == start:
                return
            events = [event for line in lines if (event := read_event(line)) is not None]
            self._store.report(job, number, end, events)
            start = end

    async def _carry_out(self, action: Start | Send | Stop | EndAttempt, job: policy.JobView) -> None:
        match action:
            case Start():
                number = self._store.start(action.job, action.placement, action.reason)
                await self._send(action.job, number)
            case Send():
                assert job.attempt is not None
                await self._send(action.job, job.attempt.number)
            case Stop():
                self._store.stopping(action.job)
                with contextlib.suppress(EngineError):  # the next pass shows the result
                    await self._runner.stop(attempt_id(job))
            case EndAttempt():
                assert job.attempt is not None
                self._store.end_attempt(action, job.attempt.error or job.attempt.message)
                self._forget(job.id, job.attempt.number)

    async def _send(self, job: str, number: int) -> None:
        spec, origin, metadata = self._store.spec(job)
        workers = self._store.open_attempt(job).placement.workers
        command = self._launch.entrypoint(job, number, workers, spec, origin)
        try:
            await self._runner.submit(_attempt_id(job, number), command, metadata)
        except RefusedError as error:
            refused = self._refusals[job, number] = self._refusals.get((job, number), 0) + 1
            log.warning("the cluster rejects attempt %d of %s: %s", number, job, error)
            if refused >= SENDS:
                reason = f"the cluster rejects the job: {error.args[0]}"
                self._store.end_attempt(EndAttempt(job, "refused", State.FAILED, reason), reason)
            return
        except EngineError as error:
            log.warning("attempt %d of %s cannot be sent yet: %s", number, job, error)
            return
        self._store.sent(job)

    def _forget(self, job: str, number: int) -> None:
        if (tail := self._tails.pop((job, number), None)) is not None:
            tail.cancel()
        self._ended_since.pop((job, number), None)
        self._refusals.pop((job, number), None)

    # MLflow

    def _begin_tracking(self) -> None:
        if (self._tracking is None or self._tracking.done()) and (untracked := self._store.untracked()):
            self._tracking = asyncio.create_task(self._told(untracked))

    async def _told(self, untracked: Sequence[Untracked]) -> None:
        for job in untracked:
            try:
                await asyncio.to_thread(self._track, job)
            except Exception as error:
                log.info("cannot mark the state of %s in MLflow yet: %s", job.job, error)
                await asyncio.sleep(5)
                return
            self._store.tracked(job)


class Controlling:
    """A controller in its own thread, so that it does not block the API.

    Args:
        controller: controller to run.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self._loop = asyncio.new_event_loop()
        self._stop, self._poked = asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def poke(self) -> None:
        """Start the next pass at once."""
        self._call(self._poked.set)

    def close(self) -> None:
        """Stop the controller; attempts on the cluster continue."""
        self._call(self._stop.set)
        self._call(self._poked.set)
        self._thread.join(timeout=20)

    def _call(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        work: Coroutine[Any, Any, None] = self.controller.run(self._stop, self._poked)
        try:
            self._loop.run_until_complete(work)
        finally:
            self._loop.close()


def attempt_id(job: policy.JobView) -> str:
    """Return the name of a job's open attempt on the cluster."""
    assert job.attempt is not None
    return _attempt_id(job.id, job.attempt.number)


def _attempt_id(job: str, number: int) -> str:
    return f"{job}-a{number}"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else ""
