"""What to do next for the jobs of a cluster: a pure function of what is stored and of what the cluster shows.

The controller calls :func:`decide` again and again and carries out what it returns. Every rule of the queue, of retries
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
"""Seconds of waiting that raise a queued job by one priority, so that none waits for ever."""

SETBACKS = 5
"""Attempts in a row that may end without progress, for reasons that are not the job's own."""

BACKOFF, LONGEST_BACKOFF = 1.0, 60.0
"""Seconds before the next attempt after the first setback, doubled with each further one, and their bound."""

GRACE = 60.0
"""Seconds that a cluster may need to show an attempt that was submitted to it."""

DRAINING = "nothing starts until `monge drain --end`"
"""What all jobs wait for while the service is draining."""

NEXT_LOOK = 0.01
"""Seconds until a job may start again whose attempt ends now: a look takes one action that changes a job."""

GROWING = 60.0
"""Seconds that an attempt has run, at least, before it is stopped to go on with more workers."""

PAUSE = "waiting for its next attempt"
"""What a job waits for after a setback, whatever else it would wait for."""


@dataclass(frozen=True)
class AttemptView:
    """The latest attempt at a job, while it has not ended in the store.

    Attributes:
        number: 1, 2, …
        placement: the workers that were reserved for it.
        started: when it was sent, or else decided, in seconds since 1970.
        sent: whether the cluster has accepted it.
        status: of it; None while the cluster has not said.
        stage: what it does, in its own words.
        trains: whether its workers have begun to train.
        progressed: whether it has seen more images than it began with, and than all attempts before it.
        error: what it said before it failed, of a kind that another attempt would meet again.
        stopping: whether this service has asked for its end.
        message: why it ended, in its own words where it said so, and of a kind that may pass.
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
    """A job that is not over.

    Attributes:
        id: of the job.
        number: order of submission.
        workers: what it asks for.
        state: of it, with its ``reason``.
        submitted: seconds since 1970.
        priority: higher ones start first.
        cancelled: who has asked to cancel it, if anybody.
        timeout: seconds that it may take from its first start on.
        first_started: when that was.
        attempt: the one that has not ended.
        attempts: made so far.
        setbacks: attempts in a row that ended without progress.
        not_before: when the next attempt may start.
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
    """What the cluster shows.

    Attributes:
        cpus, gpus: of all its nodes.
        away: why nothing is known of it; None while it answers.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    away: str | None = None

    @property
    def resources(self) -> dict[str, float]:
        """As Ray counts them."""
        return {"CPU": self.cpus, "GPU": self.gpus}


@dataclass(frozen=True)
class SchedulingLimits:
    """Bounds on what runs.

    Attributes:
        running: most jobs at a time.
        draining: whether nothing is to start, and what runs is to stop until later.
    """

    running: int = 64
    draining: bool = False


@dataclass(frozen=True)
class Start:
    """Begin the next attempt at a job."""

    job: str
    placement: Placement
    reason: str


@dataclass(frozen=True)
class Send:
    """Submit an attempt that was begun and that the cluster does not know yet; a second time changes nothing."""

    job: str


@dataclass(frozen=True)
class Stop:
    """Ask the cluster to stop the attempt at a job."""

    job: str


@dataclass(frozen=True)
class Move:
    """Give a job another state or another reason."""

    job: str
    state: State
    reason: str


@dataclass(frozen=True)
class EndAttempt:
    """Close the attempt at a job, and move the job.

    Attributes:
        job: its id.
        outcome: of the attempt, in a word.
        state, reason: of the job from now on.
        setbacks: of the job from now on.
        not_before: when the next attempt may start.
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
    """The next actions.

    Args:
        jobs: those that are not over.
        cluster: what it shows.
        now: seconds since 1970.
        limits: on what runs.

    Returns:
        At most one action that changes a job, for each job; the same input gives the same actions, and once they are
        carried out and nothing else happens there are none.
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
    """Why a job could not start even if all else had ended; None where it could."""
    try:
        placement_of(workers, cluster.resources)
    except ServiceError as error:
        return str(error.args[0])
    return None


def _attended(
    job: JobView, attempt: AttemptView, cluster: Cluster, now: float, limits: SchedulingLimits
) -> Action | None:
    """What a job needs whose attempt has not ended in the store."""
    if cluster.away:
        waits = "to cancel it" if job.cancelled else "and the job with it, as far as is known"
        return Move(job.id, State.RECOVERING, f"the cluster is away ({cluster.away}): waiting for it {waits}")
    status = attempt.status
    if not attempt.sent:
        if job.cancelled or _is_late(job, now):
            return _ended(job, attempt, AttemptStatus.UNKNOWN, now, limits)
        if refusal(job.workers, cluster) is not None:
            # Its driver would find too few nodes, and give up the job.
            return _lost(job, attempt, "the cluster has become too small for it", job.setbacks, now)
        if limits.draining:
            return _drained(job, attempt, now, limits)
        return Send(job.id)
    if status is None or (status is AttemptStatus.UNKNOWN and now - attempt.started < GRACE and not attempt.trains):
        return None
    if status.ended:
        return _ended(job, attempt, status, now, limits)
    if job.cancelled or _is_late(job, now) or limits.draining or attempt.stopping:
        return Stop(job.id)  # once more, for the request may have been lost
    if attempt.trains:
        return Move(job.id, State.RUNNING, f"on {attempt.placement}")
    starting = State.RECOVERING if attempt.number > 1 else State.STARTING
    does = f": {attempt.stage}" if attempt.stage else f" on {attempt.placement}"
    return Move(job.id, starting, f"attempt {attempt.number}{does}")


def _ended(
    job: JobView, attempt: AttemptView, status: AttemptStatus, now: float, limits: SchedulingLimits
) -> EndAttempt:
    """Where a job goes from an attempt that is over."""
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
    why = "the cluster that ran it is gone" if status is AttemptStatus.UNKNOWN else attempt.message or "its driver died"
    setbacks = 0 if attempt.progressed else job.setbacks + 1
    if setbacks > SETBACKS:
        reason = f"{setbacks} attempts in a row came no further than those before; of the last one {why}"
        return EndAttempt(job.id, "lost", State.FAILED, reason)
    return _lost(job, attempt, why, setbacks, now)


def _lost(job: JobView, attempt: AttemptView, why: str, setbacks: int, now: float) -> EndAttempt:
    """The end of an attempt that another one follows."""
    pause = min(BACKOFF * 2 ** max(0, setbacks - 1), LONGEST_BACKOFF)
    why = why.replace("; ", ", ")  # see _told
    reason = f"attempt {attempt.number} ended: {why}; {PAUSE}"
    return EndAttempt(job.id, "lost", State.RECOVERING, reason, setbacks, now + pause)


def _drained(job: JobView, attempt: AttemptView, now: float, limits: SchedulingLimits) -> EndAttempt:
    """The end of an attempt that was asked for while the service was draining, which may be over since."""
    waits, until = (DRAINING, 0.0) if limits.draining else (PAUSE, now + NEXT_LOOK)
    reason = f"attempt {attempt.number} ended: the service was told to drain; {waits}"
    return EndAttempt(job.id, "drained", State.RECOVERING, reason, job.setbacks, until)


def _grows(job: JobView, attempt: AttemptView, now: float) -> EndAttempt:
    """The end of an attempt that was asked for since there is room for more workers."""
    reason = f"attempt {attempt.number} ended: it was stopped to go on with more workers; {PAUSE}"
    return EndAttempt(job.id, "stopped", State.RECOVERING, reason, job.setbacks, now + NEXT_LOOK)


def _growth(
    holding: list[JobView],
    taken: list[Action],
    free: dict[str, float],
    cluster: Cluster,
    now: float,
    limits: SchedulingLimits,
) -> list[Action]:
    """The first job that runs with fewer workers than it asks for, and could have more: it stops, and goes on so."""
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
            # A job that has no min starts again with all its workers or not at all.
            and free[_kind(wanted)] >= (wanted.workers - attempt.placement.workers if job.workers.min is None else 1)
        ):
            return [Stop(job.id)]
    return []


def _queue(
    waiting: list[JobView], holding: list[JobView], cluster: Cluster, now: float, limits: SchedulingLimits
) -> tuple[list[Action], dict[str, float]]:
    """Who of those that wait may start, and for what the others wait; and what is free then.

    A job starts with all its workers, or with fewer where there are its ``min``. The first that does not fit holds back
    those behind it: what becomes free is for it. One that would not fit in the empty cluster holds back nobody. A job
    that pauses after a setback keeps its place.
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
                held_back, reason = True, f"{asked} asked for, {there} free, held by {_named(holders[kind])}"
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
    """Why a job cannot start, whatever the others do."""
    if cluster.away:
        return f"the cluster is away: {cluster.away}"
    if limits.draining:
        return DRAINING
    if (never := refusal(job.workers, cluster)) is not None:
        return f"{never.partition(': ')[2]}: waiting for nodes"
    return None


def _told(job: JobView, reason: str) -> str:
    # What stopped a job stays told while it waits for its next attempt.
    if job.state is not State.RECOVERING:
        return reason
    why = job.reason.partition("; ")[0]
    return f"{why}; {reason}"


def turn(priority: int, submitted: float) -> float:
    """The place of a job in the queue: the largest comes first.

    Waiting raises the priority, of all jobs alike: which of two comes first never changes.
    """
    return priority - submitted / AGING


def place_in_queue(job: JobView) -> tuple[bool, float, int]:
    """Sorts those that wait: the smallest comes first."""
    # What has run already goes on first.
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
