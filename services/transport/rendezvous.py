"""Global plans: the ranks of a job bring their points, one problem is solved over all, each gets its rows."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

import numpy as np

from pipelines.errors import BusyError, MongeError, ProblemError, RendezvousError, ServiceError
from pipelines.spec import CostName
from pipelines.transport.plan import RowBlock, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName
from services.transport.cache import size_of
from services.transport.engine import Engine


@dataclass(frozen=True, eq=False)
class RankShare:
    """What one rank brings.

    Attributes:
        job: names the job; a restarted one takes another name, so that it never meets shares of its former self.
        key: names the problem within the job.
        rank: of the bringer, below ``world``.
        world: the number of ranks.
        x: source points, (k, d), k ≥ 0, of any type of number.
        y: target points, (l, d).
        cost: name of the cost.
        epsilon: entropic regularisation.
        solver: a solver's name, or ``auto``.
        power: the exponent of cost ``power``.
        ticket: the same whenever a call is repeated: tells a repetition from a second bringer of the same rank.
        b: weights of the target points, (l,); of all ranks or of none, which makes them uniform.
        number: of the call, among those of this rank.
        received: every call of this rank below this number has ended and is not repeated.
    """

    job: str
    key: str
    rank: int
    world: int
    x: np.ndarray
    y: np.ndarray
    cost: CostName = "squared-euclidean"
    epsilon: float = 0.0
    solver: SolverName = "auto"
    power: float = 2.0
    ticket: str = ""
    b: np.ndarray | None = None
    number: int = 0
    received: int = 0

    @property
    def terms(self) -> dict[str, object]:
        """What all ranks have to agree on."""
        return {
            "world size": self.world,
            "cost": self.cost,
            "power": self.power,
            "epsilon": self.epsilon,
            "solver": self.solver,
            "dimension": self.x.shape[1],
            "weights": "none" if self.b is None else "of its own",
        }

    @property
    def size(self) -> int:
        """Bytes of points and weights."""
        return self.x.nbytes + self.y.nbytes + (0 if self.b is None else self.b.nbytes)


@dataclass(eq=False)
class _Meeting:
    """The shares of one problem that have come."""

    name: tuple[str, str]
    world: int
    terms: dict[str, object]
    plan: asyncio.Future[tuple[TransportPlan, list[int]]]
    shares: dict[int, RankShare] = field(default_factory=dict)
    tickets: dict[int, str] = field(default_factory=dict)
    repeatable: dict[tuple[int, str], int] = field(default_factory=dict)
    """Calls that may be repeated, by rank and ticket, and their numbers."""
    until: float = 0.0
    """When the last of them has no time left, on the loop's clock."""
    solving: asyncio.Task[None] | None = None
    waiters: int = 0

    def missing(self) -> str:
        """The ranks that have not come."""
        absent = [rank for rank in range(self.world) if rank not in self.shares]
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        return f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent[:8]))}{more}"

    def fault(self, share: RankShare) -> str | None:
        """Why a share does not belong to this meeting."""
        for what, agreed in self.terms.items():
            if share.terms[what] != agreed:
                others = ", ".join(map(str, sorted(self.tickets)))
                return f"rank {share.rank} has {what} {share.terms[what]}, rank {others} {agreed}"
        if self.tickets.get(share.rank, share.ticket) != share.ticket:
            return f"rank {share.rank} came twice"
        return None


class Rendezvous:
    """Where the ranks of a job meet for a plan.

    A meeting ends with its plan or with its first error, which every rank that has come receives. The answer may be
    lost on its way to a rank, which then repeats its call with the same ticket: so it is kept until every rank has
    confirmed (:attr:`RankShare.received`) or run out of time. The same key with another ticket opens a new meeting.

    Args:
        engine: solves the problems; its limits hold for each whole problem, for the bytes of all shares that wait, and
            for the answers that are kept, of which the oldest make room.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._meetings: dict[tuple[str, str], _Meeting] = {}
        self._kept: dict[_Meeting, tuple[int, asyncio.TimerHandle]] = {}
        engine.metrics.meetings.set_function(lambda: self.meetings)

    @property
    def meetings(self) -> int:
        """How many have no plan yet."""
        return len(self._meetings)

    @property
    def kept(self) -> int:
        """How many have ended, with answers that may be asked for again."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Bytes of their plans."""
        return sum(size for size, _ in self._kept.values())

    async def bring(self, share: RankShare, deadline: float) -> RowBlock:
        """Bring a share, wait for the others and for the plan.

        Args:
            share: of this rank.
            deadline: seconds to wait for the other ranks.

        Returns:
            This rank's rows of the plan over all ranks' points.

        Raises:
            RendezvousError: a rank did not come in time, came twice, or disagrees on the problem; all get the same.
            TransportError: as of :meth:`Engine.submit`; all get the same.
        """
        came = time.perf_counter()
        self._admit(share)
        self._confirm(share)
        loop = asyncio.get_running_loop()
        until = loop.time() + min(deadline, self._engine.limits.deadline)
        meeting = self._find(share) or self._join(share, until)
        meeting.waiters += 1
        alarm = loop.call_at(until, self._give_up, meeting, deadline)
        try:
            plan, starts = await asyncio.shield(meeting.plan)
        finally:
            alarm.cancel()
            self._leave(meeting, share)
        start = starts[share.rank]
        block = await asyncio.to_thread(plan.block, start, start + len(share.x))
        return replace(block, waited=time.perf_counter() - came)

    def _admit(self, share: RankShare) -> None:
        limits = self._engine.limits
        if not 1 <= share.world <= limits.world or not 0 <= share.rank < share.world:
            raise RendezvousError(
                f"rank {share.rank} of world size {share.world} received",
                hint=f"give ranks from 0, below a world size of at most {limits.world}",
            )
        if share.x.ndim != 2 or share.y.ndim != 2 or share.x.shape[1] != share.y.shape[1]:
            raise ProblemError(
                f"x has shape {share.x.shape}, y has shape {share.y.shape}",
                hint="give arrays of shape (k, d) and (l, d), of the same d",
            )
        if share.b is not None and share.b.shape != share.y.shape[:1]:
            raise ProblemError(
                f"b: shape {share.b.shape} received, {share.y.shape[:1]} expected: one weight for each target"
            )
        self._engine.check((len(share.x), len(share.y)), share.size)

    def _confirm(self, share: RankShare) -> None:
        """Forget the answers that this rank was the last to receive."""
        for meeting in [meeting for meeting in self._kept if meeting.name[0] == share.job]:
            for (rank, ticket), number in list(meeting.repeatable.items()):
                if rank == share.rank and number < share.received:
                    del meeting.repeatable[rank, ticket]
            if not meeting.repeatable:
                self._discard(meeting)

    def _find(self, share: RankShare) -> _Meeting | None:
        """The meeting that has ended, if this call to it is a repeated one."""
        name, call = (share.job, share.key), (share.rank, share.ticket)
        return next((meeting for meeting in self._kept if meeting.name == name and call in meeting.repeatable), None)

    def _join(self, share: RankShare, until: float) -> _Meeting:
        name = (share.job, share.key)
        meeting = self._meetings.get(name)
        if meeting is None:
            if len(self._meetings) >= self._engine.limits.queue:
                raise self._engine.busy(f"{len(self._meetings)} global problems wait for their ranks")
            meeting = _Meeting(name, share.world, share.terms, asyncio.get_running_loop().create_future())
        elif fault := meeting.fault(share):
            error = RendezvousError(
                f"{share.key} of {share.job}: {fault}", hint="start every rank from the same spec, each rank once"
            )
            self._expect(meeting, share, until)
            self._end(meeting, error)
            raise error
        if meeting.solving is None:
            # A repeated call takes the place of the one whose connection broke.
            self._drop(meeting, share.rank)
            self._engine.reserve(share.size)
            self._meetings[name] = meeting
            meeting.shares[share.rank], meeting.tickets[share.rank] = share, share.ticket
            if len(meeting.shares) == share.world:
                meeting.solving = asyncio.get_running_loop().create_task(self._solve(meeting))
        self._expect(meeting, share, until)
        return meeting

    def _expect(self, meeting: _Meeting, share: RankShare, until: float) -> None:
        """Take note of a call that may be repeated."""
        if share.ticket:
            meeting.repeatable[share.rank, share.ticket] = share.number
            meeting.until = max(meeting.until, until)

    async def _solve(self, meeting: _Meeting) -> None:
        shares = [meeting.shares[rank] for rank in sorted(meeting.shares)]
        starts = np.cumsum([0, *(len(share.x) for share in shares)]).tolist()
        try:
            try:
                n, m = starts[-1], sum(len(share.y) for share in shares)
                self._engine.check((n, m), sum(share.size for share in shares))
                problem = await asyncio.to_thread(_concatenate, shares)
            finally:
                for rank in range(len(shares)):
                    self._drop(meeting, rank)
            # The samples of a generator never come again: there is nothing to look up, and no use in keeping.
            plan = await self._engine.submit(problem, meeting.name[0], shares[0].solver, repeats=False)
        except MongeError as error:
            self._end(meeting, error)
        except Exception as error:
            self._end(meeting, ServiceError(f"{meeting.name[1]} of {meeting.name[0]}: {error!r}"))
        else:
            self._forget(meeting)
            if not meeting.plan.done():
                plan = plan.between(problem)
                meeting.plan.set_result((plan, starts))
                self._keep(meeting, _size_of(plan))

    def _give_up(self, meeting: _Meeting, deadline: float) -> None:
        if meeting.solving is not None or meeting.plan.done():
            return
        self._engine.metrics.timeouts.inc()
        key, job = meeting.name[1], meeting.name[0]
        error = RendezvousError(
            f"{key} of {job}: {meeting.missing()} did not come within {deadline:.3g} s",
            hint="look at that worker's log; a slow one needs a larger MONGE_PLAN_DEADLINE",
        )
        self._end(meeting, error)

    def _end(self, meeting: _Meeting, error: MongeError) -> None:
        """Give all who wait the same error."""
        self._forget(meeting)
        if not meeting.plan.done():
            meeting.plan.set_exception(error)
            # After these the ranks ask again with the same tickets, for another answer.
            if not isinstance(error, BusyError | ServiceError):
                self._keep(meeting, 0)

    def _keep(self, meeting: _Meeting, size: int) -> None:
        if not meeting.repeatable:
            return
        alarm = asyncio.get_running_loop().call_at(meeting.until, self._discard, meeting)
        self._kept[meeting] = (size, alarm)
        limits = self._engine.limits
        while self._kept and (len(self._kept) > limits.queue or self.kept_bytes > limits.kept_bytes):
            self._discard(next(iter(self._kept)))

    def _discard(self, meeting: _Meeting) -> None:
        if meeting in self._kept:
            _, alarm = self._kept.pop(meeting)
            alarm.cancel()

    def _leave(self, meeting: _Meeting, share: RankShare) -> None:
        meeting.waiters -= 1
        if meeting.solving is None and meeting.shares.get(share.rank) is share:
            self._drop(meeting, share.rank)
            del meeting.tickets[share.rank]
        if not meeting.waiters and not meeting.plan.done():
            self._forget(meeting)
            meeting.plan.cancel()

    def _forget(self, meeting: _Meeting) -> None:
        for rank in list(meeting.shares):
            self._drop(meeting, rank)
        if meeting.solving is not None and meeting.solving is not asyncio.current_task():
            meeting.solving.cancel()
        if self._meetings.get(meeting.name) is meeting:
            del self._meetings[meeting.name]

    def _drop(self, meeting: _Meeting, rank: int) -> None:
        share = meeting.shares.pop(rank, None)
        if share is not None:
            self._engine.release(share.size)


def _concatenate(shares: list[RankShare]) -> TransportProblem:
    x, y = (np.concatenate([getattr(share, side) for share in shares]) for side in "xy")
    weights = [share.b for share in shares if share.b is not None]
    return TransportProblem.between(
        x,
        y,
        b=np.concatenate(weights) if weights else None,
        cost=shares[0].cost,
        epsilon=shares[0].epsilon,
        power=shares[0].power,
    )


def _size_of(plan: TransportPlan) -> int:
    parts = (plan.assignment, plan.rows, plan.columns, plan.mass, plan.f, plan.g)
    points = size_of(plan.problem) if plan.problem is not None else 0
    return points + sum(part.nbytes for part in parts if part is not None)
