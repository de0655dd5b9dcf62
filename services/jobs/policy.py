"""Scheduling policy: a pure function from the stored jobs and the state of the cluster to the next actions.

The controller calls :func:`decide` repeatedly and executes the actions it returns. All rules of the queue, of retries
and of cancellation is here::

    queued ──> starting ──> running ──> succeeded | failed | cancelled
                  │  ↑         │
                  ↓  │         ↓
                 recovering <──┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.errors import ServiceError
from pipelines.spec import WorkersSpec
from services.jobs.states import AttemptStatus, State
from services.training.placement import Placement, placement_of

AGING = 1800.0
"""Seconds of waiting that raise the priority of a queued job by one, so that no job waits forever."""

SETBACKS = 5
"""Maximum number of consecutive attempts without progress that fail for reasons outside the job."""

BACKOFF, LONGEST_BACKOFF = 1.0, 60.0
"""Seconds before the next attempt after the first setback, doubled after each further one, and its upper bound."""

GRACE = 60.0
"""Seconds within which a submitted attempt must appear on the cluster."""

DRAINING = "no job starts until `monge drain --end`"
"""Reason why jobs wait while the service is draining."""

NEXT_LOOK = 0.01
"""Seconds until a job whose attempt ends now may start again; each pass changes a job at most once."""

GROWING = 60.0
"""Minimum run time of an attempt, in seconds, before it is restarted with more workers."""

PAUSE = "waiting for its next attempt"
"""Reason why a job waits after a setback; it takes precedence over other reasons."""


@dataclass(frozen=True)
class AttemptView:
    """The latest attempt of a job, if it has not ended in the store.

    Attributes:
        number: number of the attempt: 1, 2, …
        placement: workers reserved for the attempt.
        started: time when it was sent, or else decided, in seconds since 1970.
        sent: whether the cluster has accepted the attempt.
        status: status of the attempt on the cluster; None if not known yet.
        stage: current stage, as the attempt reported it.
        trains: whether the workers have started to train.
        progressed: whether it has seen more images than it started with and than all earlier attempts.
        error: final error that the attempt reported; another attempt would fail with it too.
        stopping: whether this service has asked the attempt to stop.
        message: reason why it ended, for errors that may be temporary; as reported by the attempt if it was.
    """

    number: int
    placement: Placement
    started: float
    sent: bool = True
    status: AttemptStatus | None = None
    stage: str | None = None
    trains: bool = False
    progressed: bool = False
    error: str | None = None
    stopping: bool = False
    message: str = ""


@dataclass(frozen=True)
class JobView:
    """A job that has not ended.

    Attributes:
        id: id of the job.
        number: position in the order of submission.
        workers: workers that the job requests.
        state: state of the job, with its ``reason``.
        submitted: time of submission in seconds since 1970.
        priority: priority; jobs with higher priority start first.
        cancelled: user who asked to cancel the job, or None.
        timeout: time limit in seconds, from the first start.
        first_started: time of the first start in seconds since 1970, or None.
        attempt: attempt that has not ended, or None.
        attempts: number of attempts so far.
        setbacks: number of consecutive attempts that ended without progress.
        not_before: earliest time of the next attempt, in seconds since 1970.
    """

    id: str
    number: int
    workers: WorkersSpec
    state: State
    submitted: float
    reason: str = ""
    priority: int = 0
    cancelled: str | None = None
    timeout: float | None = None
    first_started: float | None = None
    attempt: AttemptView | None = None
    attempts: int = 0
    setbacks: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """State of the cluster.

    Attributes:
        cpus, gpus: total resources of all nodes.
        away: reason why the cluster is unreachable; None if it is reachable.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    away: str | None = None

    @property
    def resources(self) -> dict[str, float]:
        """Return the resources under the names that Ray uses."""
        return {"CPU": self.cpus, "GPU": self.gpus}


@dataclass(frozen=True)
class SchedulingLimits:
    """Limits on running jobs.

    Attributes:
        running: maximum number of concurrent jobs.
        draining: whether no job may start and running jobs must stop until the drain ends.
    """

    running: int = 64
    draining: bool = False


@dataclass(frozen=True)
class Start:
    """Start the next attempt of a job."""

    job: str
    placement: Placement
    reason: str


@dataclass(frozen=True)
class Send:
    """Submit a stored attempt that the cluster does not know yet; sending it twice has no effect."""

    job: str


@dataclass(frozen=True)
class Stop:
    """Ask the cluster to stop the attempt of a job."""

    job: str


@dataclass(frozen=True)
class Move:
    """Change the state or the reason of a job."""

    job: str
    state: State
    reason: str


@dataclass(frozen=True)
class EndAttempt:
    """Close the attempt of a job and change the state of the job.

    Attributes:
        job: id of the job.
        outcome: outcome of the attempt, in one word.
        state, reason: new state and reason of the job.
        setbacks: new number of setbacks of the job.
        not_before: earliest time of the next attempt, in seconds since 1970.
    """

    job: str
    outcome: str
    state: State
    reason: str
    setbacks: int = 0
    not_before: float = 0.0


Action = Start | Send | Stop | Move | EndAttempt


def decide(
    jobs: Sequence[JobView], cluster: Cluster, now: float, limits: SchedulingLimits | None = None
) -> list[Action]:
    """Return the next actions.

    Args:
        jobs: jobs that have not ended.
        cluster: state of the cluster.
        now: current time in seconds since 1970.
        limits: limits on running jobs.

    Returns:
        At most one action that changes a job, for each job. The same input gives the same actions. After they are
        executed, and if nothing else changes, the next call returns no actions.
    """
    limits = limits or SchedulingLimits()
    actions: list[Action] = []
    holding: list[JobView] = []
    waiting: list[JobView] = []
    stand = {(job.id, job.state, job.reason) for job in jobs}
    for job in sorted(jobs, key=lambda job: job.number):
        if job.attempt is None:
            if job.cancelled:
                actions.append(Move(job.id, State.CANCELLED, f"cancelled by {job.cancelled}"))
            elif _is_late(job, now):
                actions.append(Move(job.id, State.FAILED, _late(job)))
            else:
                waiting.append(job)
            continue
        action = _attended(job, job.attempt, cluster, now, limits)
        if action is not None:
            actions.append(action)
        if not isinstance(action, EndAttempt):
            holding.append(job)
        elif not action.state.final:
            stand.add((job.id, action.state, action.reason))
            job = replace(job, attempt=None, state=action.state, reason=action.reason, not_before=action.not_before)
            waiting.append(job)
    queued, free = _queue(waiting, holding, cluster, now, limits)
    actions += queued
    if all(refusal(job.workers, cluster) is not None for job in waiting):
        actions += _growth(holding, actions, free, cluster, now, limits)
    return [one for one in actions if not (isinstance(one, Move) and (one.job, one.state, one.reason) in stand)]


def refusal(workers: WorkersSpec, cluster: Cluster) -> str | None:
    """Return why a job could not start even on an idle cluster; None if it could."""
    try:
        placement_of(workers, cluster.resources)
    except ServiceError as error:
        return str(error.args[0])
    return None


def _attended(
    job: JobView, attempt: AttemptView, cluster: Cluster, now: float, limits: SchedulingLimits
) -> Action | None:
    """Return the action for a job whose attempt has not ended in the store."""
    if cluster.away:
        waits = " to cancel the job" if job.cancelled else "; the job may still be running"
        return Move(job.id, State.RECOVERING, f"the cluster is unreachable ({cluster.away}): waiting for it{waits}")
    status = attempt.status
    if not attempt.sent:
        if job.cancelled or _is_late(job, now):
            return _ended(job, attempt, AttemptStatus.UNKNOWN, now, limits)
        if refusal(job.workers, cluster) is not None:
            # The driver would find too few nodes and fail the job.
            return _lost(job, attempt, "the cluster is now too small for the job", job.setbacks, now)
        if limits.draining:
            return _drained(job, attempt, now, limits)
        return Send(job.id)
    if status is None or (status is AttemptStatus.UNKNOWN and now - attempt.started < GRACE and not attempt.trains):
        return None
    if status.ended:
        return _ended(job, attempt, status, now, limits)
    if job.cancelled or _is_late(job, now) or limits.draining or attempt.stopping:
        return Stop(job.id)  # send it again: the request may have been lost
    if attempt.trains:
        return Move(job.id, State.RUNNING, f"on {attempt.placement}")
    starting = State.RECOVERING if attempt.number > 1 else State.STARTING
    does = f": {attempt.stage}" if attempt.stage else f" on {attempt.placement}"
    return Move(job.id, starting, f"attempt {attempt.number}{does}")


def _ended(
    job: JobView, attempt: AttemptView, status: AttemptStatus, now: float, limits: SchedulingLimits
) -> EndAttempt:
    """Return the next state of a job whose attempt has ended."""
    if status is AttemptStatus.SUCCEEDED:
        return EndAttempt(job.id, "succeeded", State.SUCCEEDED, "all images were seen")
    if job.cancelled:
        return EndAttempt(job.id, "cancelled", State.CANCELLED, f"cancelled by {job.cancelled}")
    if _is_late(job, now):
        return EndAttempt(job.id, "late", State.FAILED, _late(job))
    if status is AttemptStatus.STOPPED and attempt.stopping:
        grows = attempt.placement.workers < job.workers.count and not limits.draining
        return _grows(job, attempt, now) if grows else _drained(job, attempt, now, limits)
    if status is AttemptStatus.STOPPED:
        return EndAttempt(job.id, "stopped", State.CANCELLED, "stopped on the cluster, not through this service")
    if attempt.error is not None:
        return EndAttempt(job.id, "failed", State.FAILED, attempt.error)
    why = "the cluster lost the attempt" if status is AttemptStatus.UNKNOWN else attempt.message or "its driver died"
    setbacks = 0 if attempt.progressed else job.setbacks + 1
    if setbacks > SETBACKS:
        reason = f"{setbacks} consecutive attempts made no progress; the last one: {why}"
        return EndAttempt(job.id, "lost", State.FAILED, reason)
    return _lost(job, attempt, why, setbacks, now)


def _lost(job: JobView, attempt: AttemptView, why: str, setbacks: int, now: float) -> EndAttempt:
    """End an attempt that another one follows."""
    pause = min(BACKOFF * 2 ** max(0, setbacks - 1), LONGEST_BACKOFF)
    why = why.replace("; ", ", ")  # see _told
    reason = f"attempt {attempt.number} ended: {why}; {PAUSE}"
    return EndAttempt(job.id, "lost", State.RECOVERING, reason, setbacks, now + pause)


def _drained(job: JobView, attempt: AttemptView, now: float, limits: SchedulingLimits) -> EndAttempt:
    """End an attempt that was stopped by a drain; the drain may have ended since."""
    waits, until = (DRAINING, 0.0) if limits.draining else (PAUSE, now + NEXT_LOOK)
    reason = f"attempt {attempt.number} ended: the service is draining; {waits}"
    return EndAttempt(job.id, "drained", State.RECOVERING, reason, job.setbacks, until)


def _grows(job: JobView, attempt: AttemptView, now: float) -> EndAttempt:
    """End an attempt that was stopped because more workers are free."""
    reason = f"attempt {attempt.number} ended: it was stopped to resume with more workers; {PAUSE}"
    return EndAttempt(job.id, "stopped", State.RECOVERING, reason, job.setbacks, now + NEXT_LOOK)


def _growth(
    holding: list[JobView],
    taken: list[Action],
    free: dict[str, float],
    cluster: Cluster,
    now: float,
    limits: SchedulingLimits,
) -> list[Action]:
    """Stop the first job that runs with fewer workers than it requests and could have more; it resumes with more."""
    if cluster.away or limits.draining:
        return []
    busy = {one.job for one in taken if not isinstance(one, Move)}
    for job in holding:
        attempt = job.attempt
        assert attempt is not None
        lasted = attempt.trains and attempt.progressed and now - attempt.started > GROWING
        if job.id in busy or attempt.stopping or not lasted or refusal(job.workers, cluster) is not None:
            continue
        wanted = placement_of(job.workers, cluster.resources)
        if (
            wanted.gpu == attempt.placement.gpu
            and attempt.placement.workers < wanted.workers
            # A job without workers.min starts with all its workers or not at all.
            and free[_kind(wanted)] >= (wanted.workers - attempt.placement.workers if job.workers.min is None else 1)
        ):
            return [Stop(job.id)]
    return []


def _queue(
    waiting: list[JobView], holding: list[JobView], cluster: Cluster, now: float, limits: SchedulingLimits
) -> tuple[list[Action], dict[str, float]]:
    """Return the start actions and the reasons of the waiting jobs, and the resources that remain free.

    A job starts with all its workers, or with fewer if at least ``min`` of them are free. The first job that does not
    fit blocks those behind it: resources that become free go to it. A job that would not fit on an idle cluster blocks
    no others. A job that pauses after a setback keeps its place.
    """
    free = {"CPU": cluster.cpus, "GPU": cluster.gpus}
    holders: dict[str, list[JobView]] = {"CPU": [], "GPU": []}
    for job in holding:
        assert job.attempt is not None
        kind = _kind(job.attempt.placement)
        free[kind] -= job.attempt.placement.workers
        holders[kind].append(job)
    running = len(holding)
    actions: list[Action] = []
    held_back = False
    for job in sorted(waiting, key=place_in_queue):
        reason = _obstacle(job, cluster, limits)
        if reason is None and held_back:
            reason = "waiting for its turn"
        elif reason is None:
            placement = placement_of(job.workers, cluster.resources)
            kind = _kind(placement)
            if job.workers.min is not None and job.workers.min <= free[kind] < placement.workers:
                placement = Placement(int(free[kind]), placement.gpu)
            if running >= limits.running:
                held_back, reason = True, f"{_count(running, 'job')} running, which is the limit"
            elif free[kind] < placement.workers:
                asked, there = _count(placement.workers, kind), max(0, int(free[kind]))
                held_back, reason = True, f"{asked} requested, {there} free, held by {_named(holders[kind])}"
            else:
                free[kind] -= placement.workers
                running += 1
                holders[kind].append(job)
                if job.not_before <= now:
                    number = job.attempts + 1
                    actions.append(Start(job.id, placement, f"attempt {number} on {placement}"))
                    continue
                reason = PAUSE
        kept = job.state if job.state is State.RECOVERING else State.QUEUED
        actions.append(Move(job.id, kept, _told(job, PAUSE if job.not_before > now else reason)))
    return actions, free


def _obstacle(job: JobView, cluster: Cluster, limits: SchedulingLimits) -> str | None:
    """Return why a job cannot start, independent of other jobs."""
    if cluster.away:
        return f"the cluster is unreachable: {cluster.away}"
    if limits.draining:
        return DRAINING
    if (never := refusal(job.workers, cluster)) is not None:
        return f"{never.partition(': ')[2]}: waiting for nodes"
    return None


def _told(job: JobView, reason: str) -> str:
    # Keep the reason of the stop while the job waits for its next attempt.
    if job.state is not State.RECOVERING:
        return reason
    why = job.reason.partition("; ")[0]
    return f"{why}; {reason}"


def turn(priority: int, submitted: float) -> float:
    """Return the sort key of a job in the queue; the largest comes first.

    Waiting raises the priority of all jobs alike, so the order of two jobs never changes.
    """
    return priority - submitted / AGING


def place_in_queue(job: JobView) -> tuple[bool, float, int]:
    """Return the sort key of a waiting job; the smallest comes first."""
    # Jobs that have run before come first.
    return job.state is not State.RECOVERING, -turn(job.priority, job.submitted), job.number


def _kind(placement: Placement) -> str:
    return "GPU" if placement.gpu else "CPU"


def _is_late(job: JobView, now: float) -> bool:
    return job.timeout is not None and job.first_started is not None and now - job.first_started > job.timeout


def _late(job: JobView) -> str:
    return f"it took longer than its timeout of {job.timeout:g} s"


def _count(count: int, kind: str) -> str:
    return f"{count} {kind}{'s' * (count != 1)}"


def _named(jobs: Sequence[JobView]) -> str:
    names = [job.id for job in sorted(jobs, key=lambda job: job.number)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
