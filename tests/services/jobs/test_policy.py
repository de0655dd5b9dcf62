"""Rules of the queue, of retries and of cancellation, one case each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipelines.spec import WorkersSpec
from services.jobs.policy import (
    AGING,
    GRACE,
    GROWING,
    NEXT_LOOK,
    SETBACKS,
    Action,
    AttemptStatus,
    AttemptView,
    Cluster,
    EndAttempt,
    JobView,
    Move,
    SchedulingLimits,
    Send,
    Start,
    State,
    Stop,
    decide,
)
from services.training.placement import Placement

NOW = 1e9
HERE, AWAY = Cluster(cpus=2.0), Cluster(away="timeout")
LATE = {"timeout": 50.0, "first_started": NOW - 51}
TOO_LATE = "it took longer than its timeout of 50 s"


def queued(number: int, count: int = 1, device: str = "cpu", **fields: Any) -> JobView:
    workers = WorkersSpec.model_validate({"count": count, "device": device})
    fields = {"state": State.QUEUED, "submitted": NOW - 100 + number, "reason": "new"} | fields
    return JobView(f"j{number}", number, workers, **fields)


def tried(
    job: int, count: int = 1, gpu: bool = False, *, of_job: dict[str, Any] | None = None, **fields: Any
) -> JobView:
    """Create a job with an open attempt, by default the first one."""
    fields = {"number": 1, "started": NOW - 10} | fields
    attempt = AttemptView(placement=Placement(count, gpu), **fields)
    changes = {"state": State.STARTING, "attempts": attempt.number, "first_started": NOW - 10} | (of_job or {})
    return queued(job, count, "gpu" if gpu else "cpu", attempt=attempt, **changes)


def running(number: int, count: int = 1, gpu: bool = False, **fields: Any) -> JobView:
    of_job = {"state": State.RUNNING, "reason": f"on {Placement(count, gpu)}"}
    return tried(number, count, gpu, of_job=of_job, status=AttemptStatus.RUNNING, trains=True, **fields)


def starts(number: int, count: int = 1, gpu: bool = False, attempt: int = 1) -> Start:
    placement = Placement(count, gpu)
    return Start(f"j{number}", placement, f"attempt {attempt} on {placement}")


def waits(number: int, reason: str) -> Move:
    return Move(f"j{number}", State.QUEUED, reason)


def recovers(why: str, setbacks: int, pause: float) -> EndAttempt:
    reason = f"attempt 1 ended: {why}; waiting for its next attempt"
    return EndAttempt("j1", "lost", State.RECOVERING, reason, setbacks, NOW + pause)


def elastic(job: JobView, fewest: int, count: int | None = None) -> JobView:
    """Return the job with a minimum number of workers, and with the given number of requested workers."""
    return replace(job, workers=job.workers.model_copy(update={"min": fewest, "count": count or job.workers.count}))


LOST = queued(1, 2, state=State.RECOVERING, reason="attempt 1 ended: x; y", attempts=1, first_started=NOW - 60)
LOST_TOO = replace(LOST, id="j4", number=4)
GONE, DIED = "the cluster lost the attempt", "exit code 137"
AGAIN = {"state": State.RECOVERING, "reason": ""}
BY_ANN = {"cancelled": "ann"}
GOES_ON = Move("j1", State.RUNNING, "on 1 worker on CPUs")

QUEUE = {
    "the first fits": ([queued(1, 2)], HERE, [starts(1, 2)]),
    "the second of two waits and says for what": (
        [queued(1), queued(2, 2)],
        HERE,
        [starts(1), waits(2, "2 CPUs requested, 1 free, held by j1")],
    ),
    "nothing is free": ([running(1, 2), queued(2, 2)], HERE, [waits(2, "2 CPUs requested, 0 free, held by j1")]),
    "a small job does not overtake a large one": (
        [running(1), queued(2, 2), queued(3)],
        HERE,
        [waits(2, "2 CPUs requested, 1 free, held by j1"), waits(3, "waiting for its turn")],
    ),
    "a job that could never fit holds back nobody": (
        [queued(1, 3), queued(2, 2)],
        HERE,
        [waits(1, "3 CPUs requested, the cluster has 2: waiting for nodes"), starts(2, 2)],
    ),
    "the higher priority starts first": (
        [queued(1, 2), queued(2, 2, priority=1)],
        HERE,
        [starts(2, 2), waits(1, "2 CPUs requested, 0 free, held by j2")],
    ),
    "the oldest of one priority starts first": ([queued(2), queued(1)], HERE, [starts(1), starts(2)]),
    "the smaller number of one moment starts first": (
        [queued(2, submitted=NOW), queued(1, submitted=NOW)],
        HERE,
        [starts(1), starts(2)],
    ),
    "waiting makes up for priority": (
        [queued(1, submitted=NOW - AGING - 1), queued(2, priority=1, submitted=NOW)],
        HERE,
        [starts(1), starts(2)],
    ),
    "many holders are counted": (
        [*(running(number) for number in range(1, 6)), queued(6, 2)],
        Cluster(cpus=6.0),
        [waits(6, "2 CPUs requested, 1 free, held by j1, j2, j3 and 2 more")],
    ),
    "holders are named in the order of their submission": (
        [running(2), queued(1), queued(3, 2)],
        HERE,
        [starts(1), waits(3, "2 CPUs requested, 0 free, held by j1, j2")],
    ),
    "nodes went away under a job": (
        [running(1, 4), queued(2)],
        HERE,
        [waits(2, "1 CPU requested, 0 free, held by j1")],
    ),
    "a job with a min takes what is free": (
        [running(1), elastic(queued(2, 4), 2)],
        Cluster(cpus=4.0),
        [starts(2, 3)],
    ),
    "a job with a min waits for it": (
        [running(1), elastic(queued(2, 4), 2)],
        HERE,
        [waits(2, "2 CPUs requested, 1 free, held by j1")],
    ),
    "a job whose nodes went away goes on with the rest": (
        [elastic(tried(1, 2, status=AttemptStatus.FAILED, message="exit code 137"), 1)],
        Cluster(cpus=1.0),
        [recovers(DIED, 1, 1.0)],
    ),
    "GPUs are counted by themselves": (
        [running(1, 4), running(2, 1, gpu=True), queued(3, 1, "gpu"), queued(4, 1, "gpu")],
        Cluster(cpus=2.0, gpus=2.0),
        [starts(3, 1, gpu=True), waits(4, "1 GPU requested, 0 free, held by j2, j3")],
    ),
    "a job that takes what there is takes GPUs": (
        [queued(1, 2, "auto")],
        Cluster(cpus=8.0, gpus=2.0),
        [starts(1, 2, gpu=True)],
    ),
    "what has run already goes first": (
        [queued(2, 2, priority=9), LOST],
        HERE,
        [starts(1, 2, attempt=2), waits(2, "2 CPUs requested, 0 free, held by j1")],
    ),
    "a job that pauses keeps its place": (
        [replace(LOST, not_before=NOW + 1), queued(2)],
        HERE,
        [
            Move("j1", State.RECOVERING, "attempt 1 ended: x; waiting for its next attempt"),
            waits(2, "1 CPU requested, 0 free, held by j1"),
        ],
    ),
    "a job that pauses and finds too few nodes keeps no place": (
        [replace(LOST, not_before=NOW + 1), queued(2)],
        Cluster(cpus=1.0),
        [Move("j1", State.RECOVERING, "attempt 1 ended: x; waiting for its next attempt"), starts(2)],
    ),
    "a job that is lost keeps its place": (
        [tried(1, 2, status=AttemptStatus.FAILED, message="exit code 137"), queued(2)],
        HERE,
        [recovers(DIED, 1, 1.0), waits(2, "1 CPU requested, 0 free, held by j1")],
    ),
    "an end makes room at once": (
        [tried(1, 2, status=AttemptStatus.SUCCEEDED), queued(2)],
        HERE,
        [EndAttempt("j1", "succeeded", State.SUCCEEDED, "all images were seen"), starts(2)],
    ),
    "a retried job goes on with the next attempt": ([queued(1, attempts=3)], HERE, [starts(1, attempt=4)]),
    "a cluster that is away starts nothing": ([queued(1)], AWAY, [waits(1, "the cluster is unreachable: timeout")]),
    "a lost job tells why and that the cluster is unreachable": (
        [LOST],
        AWAY,
        [Move("j1", State.RECOVERING, "attempt 1 ended: x; the cluster is unreachable: timeout")],
    ),
    "a queued job is cancelled": ([queued(1, **BY_ANN)], AWAY, [Move("j1", State.CANCELLED, "cancelled by ann")]),
    "a lost job is late": ([replace(LOST, **LATE)], AWAY, [Move("j1", State.FAILED, TOO_LATE)]),
    "a queue is no part of the timeout": ([queued(1, timeout=1.0)], HERE, [starts(1)]),
}

ATTEMPTS: dict[str, tuple[JobView, Action | None]] = {
    "unsent": (tried(1, sent=False, status=AttemptStatus.UNKNOWN), Send("j1")),
    "unsent and cancelled": (
        tried(1, sent=False, of_job=BY_ANN),
        EndAttempt("j1", "cancelled", State.CANCELLED, "cancelled by ann"),
    ),
    "unsent and late": (tried(1, sent=False, of_job=LATE), EndAttempt("j1", "late", State.FAILED, TOO_LATE)),
    "unsent and too large by now": (
        tried(1, 3, sent=False, of_job={"setbacks": 2}),
        recovers("the cluster is now too small for the job", 2, 2.0),
    ),
    "of no status yet": (tried(1), None),
    "pending": (tried(1, status=AttemptStatus.PENDING), Move("j1", State.STARTING, "attempt 1 on 1 worker on CPUs")),
    "at a stage": (
        tried(1, status=AttemptStatus.RUNNING, stage="sharding"),
        Move("j1", State.STARTING, "attempt 1: sharding"),
    ),
    "the second at a stage": (
        tried(1, status=AttemptStatus.RUNNING, stage="sharding", number=2),
        Move("j1", State.RECOVERING, "attempt 2: sharding"),
    ),
    "training": (
        tried(1, 2, status=AttemptStatus.RUNNING, trains=True),
        Move("j1", State.RUNNING, "on 2 workers on CPUs"),
    ),
    "succeeded though late and cancelled": (
        tried(1, status=AttemptStatus.SUCCEEDED, of_job=LATE | BY_ANN),
        EndAttempt("j1", "succeeded", State.SUCCEEDED, "all images were seen"),
    ),
    "failed by an error of its own": (
        tried(1, status=AttemptStatus.FAILED, error="loss is nan", message="exit code 1"),
        EndAttempt("j1", "failed", State.FAILED, "loss is nan"),
    ),
    "died": (tried(1, status=AttemptStatus.FAILED, message="exit code 137"), recovers(DIED, 1, 1.0)),
    "died without a word": (tried(1, status=AttemptStatus.FAILED), recovers("its driver died", 1, 1.0)),
    "died with two words": (tried(1, status=AttemptStatus.FAILED, message="a; b"), recovers("a, b", 1, 1.0)),
    "died a third time": (
        tried(1, status=AttemptStatus.FAILED, message="exit code 137", of_job={"setbacks": 2}),
        recovers(DIED, 3, 4.0),
    ),
    "died the last time but one": (
        tried(1, status=AttemptStatus.UNKNOWN, trains=True, of_job={"setbacks": SETBACKS - 1}),
        recovers(GONE, SETBACKS, 16.0),
    ),
    "died too often": (
        tried(1, status=AttemptStatus.UNKNOWN, trains=True, of_job={"setbacks": SETBACKS}),
        EndAttempt("j1", "lost", State.FAILED, f"6 consecutive attempts made no progress; the last one: {GONE}"),
    ),
    "died after progress": (
        tried(1, status=AttemptStatus.UNKNOWN, trains=True, progressed=True, of_job={"setbacks": SETBACKS}),
        recovers(GONE, 0, 1.0),
    ),
    "not shown yet": (tried(1, status=AttemptStatus.UNKNOWN, started=NOW - GRACE + 1), None),
    "never shown": (tried(1, status=AttemptStatus.UNKNOWN, started=NOW - GRACE), recovers(GONE, 1, 1.0)),
    "not shown though it trained": (tried(1, status=AttemptStatus.UNKNOWN, trains=True), recovers(GONE, 1, 1.0)),
    "stopped by nobody": (
        tried(1, status=AttemptStatus.STOPPED),
        EndAttempt("j1", "stopped", State.CANCELLED, "stopped on the cluster, not through this service"),
    ),
    "running and cancelled": (tried(1, status=AttemptStatus.RUNNING, trains=True, of_job=BY_ANN), Stop("j1")),
    "stopped for ann": (
        tried(1, status=AttemptStatus.STOPPED, of_job=BY_ANN),
        EndAttempt("j1", "cancelled", State.CANCELLED, "cancelled by ann"),
    ),
    "died when it was cancelled": (
        tried(1, status=AttemptStatus.FAILED, error="x", of_job=BY_ANN),
        EndAttempt("j1", "cancelled", State.CANCELLED, "cancelled by ann"),
    ),
    "running and late": (tried(1, status=AttemptStatus.RUNNING, of_job=LATE), Stop("j1")),
    "stopped for being late": (
        tried(1, status=AttemptStatus.STOPPED, of_job=LATE),
        EndAttempt("j1", "late", State.FAILED, TOO_LATE),
    ),
    "not late yet": (
        tried(1, of_job=LATE | {"first_started": NOW - 50}, status=AttemptStatus.RUNNING, trains=True),
        GOES_ON,
    ),
    "back with its cluster": (tried(1, status=AttemptStatus.RUNNING, trains=True, of_job=AGAIN), GOES_ON),
}


def carried_out(jobs: list[JobView], actions: list[Action]) -> list[JobView]:
    """Apply actions and return the jobs that are not over; a new attempt has no status."""
    left = {job.id: job for job in jobs}
    for action in actions:
        job = left[action.job]
        match action:
            case Start(_, placement, reason):
                number = job.attempts + 1
                state = State.RECOVERING if number > 1 else State.STARTING
                attempt = AttemptView(number, placement, NOW)
                left[job.id] = replace(job, attempt=attempt, attempts=number, state=state, reason=reason)
            case Move(_, state, reason):
                left[job.id] = replace(job, state=state, reason=reason)
            case EndAttempt(_, _, state, reason, setbacks, not_before):
                ended = {"attempt": None, "setbacks": setbacks, "not_before": not_before}
                left[job.id] = replace(job, state=state, reason=reason, **ended)
    return [job for job in left.values() if not job.state.final]


def decided(jobs: list[JobView], cluster: Cluster, limits: SchedulingLimits | None = None) -> list[Action]:
    """Return the actions; check that they do not depend on the order of the jobs and are not repeated."""
    actions = decide(jobs, cluster, NOW, limits)
    assert decide(jobs[::-1], cluster, NOW, limits) == actions
    again = decide(carried_out(jobs, actions), cluster, NOW, limits)
    assert [action for action in again if not isinstance(action, Send | Stop)] == []
    return actions


@pytest.mark.parametrize(("jobs", "cluster", "actions"), QUEUE.values(), ids=QUEUE.keys())
def test_the_queue(jobs: list[JobView], cluster: Cluster, actions: list[Action]) -> None:
    said = decided(jobs, cluster)
    assert sorted(said, key=str) == sorted(actions, key=str)
    started = [action for action in said if isinstance(action, Start)]
    assert started == [action for action in actions if isinstance(action, Start)], "in another order"


@pytest.mark.parametrize(("job", "action"), ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_an_attempt_that_is(job: JobView, action: Action | None) -> None:
    assert decided([job], HERE) == ([] if action is None else [action])


@pytest.mark.parametrize(
    ("of_job", "waits_for"),
    [({}, "; the job may still"), (BY_ANN, " to cancel the job"), (LATE, "; the job may still")],
)
@pytest.mark.parametrize("sent", [True, False])
def test_a_job_recovers_while_its_cluster_is_away(of_job: dict[str, Any], waits_for: str, sent: bool) -> None:
    [action] = decided([tried(1, sent=sent, trains=sent, of_job=of_job)], AWAY)
    assert isinstance(action, Move)
    assert action.state is State.RECOVERING
    assert action.reason.startswith(f"the cluster is unreachable (timeout): waiting for it{waits_for}")


@pytest.mark.parametrize(("limit", "told"), [(1, "1 job"), (2, "2 jobs")])
def test_the_limit_of_running_jobs(limit: int, told: str) -> None:
    actions = decided([queued(1), queued(2), queued(3)], Cluster(cpus=9.0), SchedulingLimits(running=limit))
    assert actions[:limit] == [starts(1), starts(2)][:limit]
    assert actions[limit] == waits(limit + 1, f"{told} running, which is the limit")
    assert all(action == waits(3, "waiting for its turn") for action in actions[limit + 1 :])


SMALL = elastic(running(1, 1, progressed=True, started=NOW - GROWING - 1), 1, count=2)
"""A job that runs with one worker and requests two."""


def of_attempt(job: JobView, **fields: Any) -> JobView:
    assert job.attempt is not None
    return replace(job, attempt=replace(job.attempt, **fields))


def test_a_job_grows_where_there_is_room() -> None:
    assert decided([SMALL], HERE) == [Stop("j1")]
    stopped = of_attempt(SMALL, status=AttemptStatus.STOPPED, stopping=True)
    grows = "attempt 1 ended: it was stopped to resume with more workers; waiting for its next attempt"
    [ends] = decided([stopped], HERE)
    assert ends == EndAttempt("j1", "stopped", State.RECOVERING, grows, not_before=NOW + NEXT_LOOK)
    waiting = replace(stopped, attempt=None, state=ends.state, reason=ends.reason, not_before=ends.not_before)
    assert decided([waiting], HERE) == []
    assert decide([waiting], HERE, NOW + 0.5) == [starts(1, 2, attempt=2)]


@pytest.mark.parametrize(
    ("job", "others", "cluster"),
    [
        (SMALL, [], Cluster(cpus=1.0)),
        (SMALL, [running(2)], HERE),
        (SMALL, [queued(2, 2)], HERE),
        (replace(SMALL, workers=WorkersSpec(count=4, device="cpu")), [running(2)], Cluster(cpus=4.0)),
        (of_attempt(SMALL, progressed=False), [], HERE),
        (of_attempt(SMALL, started=NOW - 1), [], HERE),
        (SMALL, [], Cluster(cpus=2.0, gpus=0.0, away="gone")),
        (running(1, 2, progressed=True, started=NOW - 1000), [], Cluster(cpus=9.0)),
    ],
    ids=["no room", "held", "another waits", "not all of them", "no progress", "too soon", "away", "has all"],
)
def test_a_job_does_not_grow_while(job: JobView, others: list[JobView], cluster: Cluster) -> None:
    assert not [action for action in decided([job, *others], cluster) if isinstance(action, Stop)]


def test_a_stop_is_asked_for_until_it_is_heard() -> None:
    assert decided([of_attempt(SMALL, stopping=True)], Cluster(cpus=1.0)) == [Stop("j1")]


def test_of_several_small_jobs_one_grows_at_a_time() -> None:
    other = replace(SMALL, id="j2", number=2)
    assert decided([SMALL, other], Cluster(cpus=4.0)) == [Stop("j1")]


def test_draining_starts_nothing_and_stops_what_runs_until_later() -> None:
    why = "no job starts until `monge drain --end`"
    drained = f"attempt 1 ended: the service is draining; {why}"
    actions = decided([queued(1), tried(2, sent=False), running(3), LOST_TOO], HERE, SchedulingLimits(draining=True))
    assert actions == [
        EndAttempt("j2", "drained", State.RECOVERING, drained),
        Stop("j3"),
        Move("j4", State.RECOVERING, f"attempt 1 ended: x; {why}"),
        waits(1, why),
    ]
    stopped = running(3, stopping=True)
    assert stopped.attempt is not None
    stopped = replace(stopped, attempt=replace(stopped.attempt, status=AttemptStatus.STOPPED))
    assert decided([stopped], HERE, SchedulingLimits(draining=True)) == [
        EndAttempt("j3", "drained", State.RECOVERING, drained)
    ]
    # Draining ended while it was being stopped: it starts again, in the look after the one that ends its attempt.
    again = "attempt 1 ended: the service is draining; waiting for its next attempt"
    [ends] = decided([stopped], HERE)
    assert ends == EndAttempt("j3", "drained", State.RECOVERING, again, not_before=NOW + NEXT_LOOK)
    waiting = replace(stopped, attempt=None, state=ends.state, reason=ends.reason, not_before=ends.not_before)
    assert decide([waiting], HERE, NOW + 0.5) == [starts(3, attempt=2)]
    ended = replace(stopped, cancelled="ann")
    assert decided([ended], HERE)[0] == EndAttempt("j3", "cancelled", State.CANCELLED, "cancelled by ann")
