"""The policy in a hostile simulation of store, cluster and clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipelines.spec import WorkersSpec
from services.jobs import policy
from services.jobs.policy import AttemptView, Cluster, EndAttempt, JobView, Move, SchedulingLimits, Send, Start, Stop
from services.jobs.states import AttemptStatus, State
from services.training.placement import Placement

ITS_OWN = "loss is nan"


class Shelf:
    """In-memory simulation of the store."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobView] = {}

    def unfinished(self) -> list[JobView]:
        return [job for job in self.jobs.values() if not job.state.final]

    def change(self, job: str, **changes: object) -> None:
        self.jobs[job] = replace(self.jobs[job], **changes)

    def change_attempt(self, job: str, **changes: object) -> None:
        attempt = self.jobs[job].attempt
        assert attempt is not None
        self.change(job, attempt=replace(attempt, **changes))

    def move(self, job: str, state: State, reason: str) -> None:
        assert not self.jobs[job].state.final, "a final state changes"
        self.change(job, state=state, reason=reason)

    def start(self, action: Start, now: float) -> int:
        job = self.jobs[action.job]
        assert job.attempt is None
        number = job.attempts + 1
        self.move(job.id, State.RECOVERING if number > 1 else State.STARTING, action.reason)
        attempt = AttemptView(number, Placement(action.placement.workers, action.placement.gpu), now, sent=False)
        self.change(job.id, attempt=attempt, attempts=number, first_started=job.first_started or now)
        return number

    def end_attempt(self, action: EndAttempt) -> None:
        assert self.jobs[action.job].attempt is not None
        self.move(action.job, action.state, action.reason)
        self.change(action.job, attempt=None, setbacks=action.setbacks, not_before=action.not_before)


@dataclass
class Driver:
    """Driver of one attempt on the simulated cluster."""

    status: AttemptStatus = AttemptStatus.PENDING
    stops: bool = False


@dataclass
class World:
    """Simulated Ray cluster with its dashboard."""

    nodes: list[tuple[int, int]] = field(default_factory=lambda: [(2, 0)])
    away: str | None = None
    loses: str | None = None
    """What the next submission loses: the request or the response."""
    drivers: dict[tuple[str, int], Driver] = field(default_factory=dict)

    def look(self) -> Cluster:
        if self.away:
            return Cluster(away=self.away)
        return Cluster(sum(cpus for cpus, _ in self.nodes), sum(gpus for _, gpus in self.nodes))

    def live(self) -> list[tuple[str, int]]:
        return [key for key, driver in self.drivers.items() if not driver.status.ended]

    def submit(self, key: tuple[str, int]) -> bool:
        """Submit an attempt; return whether the response arrives."""
        lost, self.loses = self.loses, None
        if lost != "request":
            self.drivers.setdefault(key, Driver())
        return lost is None


class PolicyMachine(RuleBasedStateMachine):
    """Each rule changes the simulation, then runs one iteration of the controller."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1.8e9
        self.shelf, self.world, self.limits = Shelf(), World(), SchedulingLimits(running=3)

    # The controller

    def look(self) -> None:
        self.now += 0.5
        cluster = self.world.look()
        for key, driver in self.world.drivers.items():
            if cluster.away is None and driver.stops and not driver.status.ended:
                driver.status = AttemptStatus.STOPPED
            attempt = self.shelf.jobs[key[0]].attempt
            if cluster.away is None and attempt is not None and attempt.number == key[1]:
                self.shelf.change_attempt(key[0], sent=True)
        statuses = {key: driver.status for key, driver in self.world.drivers.items()}
        actions = policy.decide(self.seen(cluster, statuses), cluster, self.now, self.limits)
        assert len({action.job for action in actions}) == len(actions)
        self.require_order([action.job for action in actions if isinstance(action, Start)], cluster)
        for action in actions:
            self.carry_out(action, cluster)
        for action in actions:
            if isinstance(action, Move):
                self.shelf.move(action.job, action.state, action.reason)
        self.require_no_idling(cluster)
        again = policy.decide(self.seen(cluster, statuses, actions), cluster, self.now, self.limits)
        assert [action for action in again if not isinstance(action, Send | Stop)] == []

    def seen(self, cluster: Cluster, statuses: dict, actions: Sequence[policy.Action] = ()) -> list[JobView]:
        """Return the controller's input to the policy; the status of an attempt that was just submitted is unknown."""
        began = {action.job for action in actions if isinstance(action, Start | Send)}
        jobs = []
        for job in self.shelf.unfinished():
            if job.attempt is not None and cluster.away is None and job.id not in began:
                status = statuses.get((job.id, job.attempt.number), AttemptStatus.UNKNOWN)
                job = replace(job, attempt=replace(job.attempt, status=status))
            jobs.append(job)
        return jobs

    def carry_out(self, action: policy.Action, cluster: Cluster) -> None:
        match action:
            case Start():
                self.require_room(action.placement, cluster)
                self.send(action.job, self.shelf.start(action, self.now))
            case Send():
                self.send(action.job, self.shelf.jobs[action.job].attempts)
            case Stop():
                self.shelf.change_attempt(action.job, stopping=True)
                self.world.drivers[action.job, self.shelf.jobs[action.job].attempts].stops = True
            case EndAttempt():
                self.shelf.end_attempt(action)

    def send(self, job: str, number: int) -> None:
        never = policy.refusal(self.shelf.jobs[job].workers, self.world.look())
        assert never is None, "a driver that finds too few nodes gives up its job"
        if self.world.submit((job, number)):
            self.shelf.change_attempt(job, sent=True)

    def require_room(self, placement: Placement, cluster: Cluster) -> None:
        held = [job.attempt.placement for job in self.shelf.unfinished() if job.attempt is not None]
        taken = sum(one.workers for one in [*held, placement] if one.gpu == placement.gpu)
        assert taken <= (cluster.gpus if placement.gpu else cluster.cpus), "more workers than there is room for"
        assert not self.limits.draining
        assert len(held) < self.limits.running

    def require_order(self, started: Sequence[str], cluster: Cluster) -> None:
        waiting = [job for job in self.shelf.unfinished() if job.attempt is None and job.cancelled is None]
        queued = [job for job in waiting if job.not_before <= self.now]
        fits = [job for job in queued if policy.refusal(job.workers, cluster) is None]
        for job in fits:
            for other in fits:
                if job.id in started and other.id not in started and not self.is_late(other):
                    mine, its = (policy.turn(one.priority, one.submitted) for one in (job, other))
                    assert job.state is State.RECOVERING or (other.state is State.QUEUED and its <= mine)

    def require_no_idling(self, cluster: Cluster) -> None:
        """Check that the first job that could fit waits only for capacity; cancelled and late jobs must not wait."""
        jobs = self.shelf.unfinished()
        held = [job.attempt.placement for job in jobs if job.attempt is not None]
        waiting = sorted((job for job in jobs if job.attempt is None), key=policy.place_in_queue)
        assert not any(job.cancelled or self.is_late(job) for job in waiting)
        fits = [job for job in waiting if policy.refusal(job.workers, cluster) is None]
        pauses = any(job.not_before > self.now for job in jobs)
        if not fits or cluster.away or self.limits.draining or pauses or len(held) >= self.limits.running:
            return
        first = policy.placement_of(fits[0].workers, cluster.resources)
        taken = sum(one.workers for one in [*held, first] if one.gpu == first.gpu)
        assert taken > (cluster.gpus if first.gpu else cluster.cpus), f"{fits[0].id} could start: {fits[0].reason}"

    def is_late(self, job: JobView) -> bool:
        return bool(job.timeout and job.first_started and self.now - job.first_started > job.timeout)

    # What happens

    @rule(
        workers=st.builds(WorkersSpec, count=st.integers(1, 4), device=st.sampled_from(["cpu", "auto", "gpu"])),
        priority=st.integers(-1, 2),
        timeout=st.sampled_from([None, None, 5.0, 100.0]),
    )
    def submit(self, workers: WorkersSpec, priority: int, timeout: float | None) -> None:
        number = len(self.shelf.jobs) + 1
        job = JobView(f"j{number}", number, workers, State.QUEUED, self.now, "new", priority, timeout=timeout)
        self.shelf.jobs[job.id] = job
        self.look()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if jobs := self.shelf.unfinished():
            self.shelf.change(data.draw(st.sampled_from(jobs)).id, cancelled="ann")
        self.look()

    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        if jobs := [job for job in self.shelf.jobs.values() if job.state in (State.FAILED, State.CANCELLED)]:
            changes = {"cancelled": None, "first_started": None, "setbacks": 0, "not_before": 0.0}
            job = data.draw(st.sampled_from(jobs)).id
            self.shelf.change(job, state=State.QUEUED, reason="queued again by ann", **changes)
        self.look()

    @rule(seconds=st.sampled_from([0.0, 1.0, 10.0, 70.0, 2000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.look()

    @rule(node=st.sampled_from([(1, 0), (2, 0), (4, 0), (2, 2)]))
    def node_comes(self, node: tuple[int, int]) -> None:
        self.world.nodes.append(node)
        self.look()

    @precondition(lambda self: self.world.nodes)
    @rule(index=st.integers(0, 99))
    def node_goes(self, index: int) -> None:
        self.world.nodes.pop(index % len(self.world.nodes))
        self.look()

    @rule()
    def cluster_forgets(self) -> None:
        self.world.drivers.clear()
        self.look()

    @rule(away=st.sampled_from([None, "no answer in time"]))
    def cluster_goes_or_comes(self, away: str | None) -> None:
        self.world.away = away
        self.look()

    @rule(loses=st.sampled_from(["request", "answer"]))
    def network_drops(self, loses: str) -> None:
        self.world.loses = loses
        self.look()

    @rule(draining=st.booleans())
    def drain(self, draining: bool) -> None:
        self.limits = replace(self.limits, draining=draining)
        self.look()

    @precondition(lambda self: self.world.live())
    @rule(
        happens=st.sampled_from(["runs", "trains", "steps", "succeeds", "dies", "errs", "is stopped"]),
        index=st.integers(0, 99),
    )
    def attempt_goes_on(self, happens: str, index: int) -> None:
        self.go_on(self.world.live()[index % len(self.world.live())], happens)
        self.look()

    def go_on(self, key: tuple[str, int], happens: str) -> None:
        ends = {
            "succeeds": AttemptStatus.SUCCEEDED,
            "dies": AttemptStatus.FAILED,
            "errs": AttemptStatus.FAILED,
            "is stopped": AttemptStatus.STOPPED,
        }
        self.world.drivers[key].status = ends.get(happens, AttemptStatus.RUNNING)
        if happens in ("trains", "steps"):
            self.shelf.change_attempt(key[0], trains=True)
        if happens == "steps":
            self.shelf.change_attempt(key[0], progressed=True)
        if happens == "errs":
            self.shelf.change_attempt(key[0], error=ITS_OWN)

    # What always holds

    @invariant()
    def no_live_attempt_is_alone_or_doubled(self) -> None:
        for job, number in self.world.live():
            attempt = self.shelf.jobs[job].attempt
            assert attempt is not None, f"{job} is {self.shelf.jobs[job].state} and still runs"
            assert attempt.number == number, f"two attempts at {job}"

    @invariant()
    def every_job_is_known_and_says_what_it_waits_for(self) -> None:
        for job in self.shelf.jobs.values():
            assert job.reason
            assert job.state.final == (job not in self.shelf.unfinished())
            assert job.attempt is None or not job.state.final

    def teardown(self) -> None:
        """Check that every job ends on a cluster with capacity for the largest job, if all drivers succeed."""
        self.world.nodes, self.world.away, self.world.loses = [(4, 4)], None, None
        self.limits = SchedulingLimits(running=3)
        for _ in range(30 + 5 * len(self.shelf.jobs)):
            for key in self.world.live():
                running = self.world.drivers[key].status is AttemptStatus.RUNNING
                self.go_on(key, "succeeds" if running else "runs")
            self.now += 5
            self.look()
        assert self.shelf.unfinished() == []


TestPolicyMachine = PolicyMachine.TestCase
TestPolicyMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None, derandomize=True)
