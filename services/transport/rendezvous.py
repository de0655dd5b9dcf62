"""Global plans: collect the shares of all ranks, solve one problem over all points, return to each rank its rows."""

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
    """The share of one rank.

    Attributes:
        job: name of the job; a restarted job uses another name, to separate its shares from earlier ones.
        key: name of the problem within the job.
        rank: rank of the sender, below ``world``.
        world: number of ranks.
        x: source points, (k, d), k ≥ 0, of any numeric dtype.
        y: target points, (l, d).
        cost: name of the transport cost.
        epsilon: strength of the entropic regularisation.
        solver: name of a solver, or ``auto``.
        power: exponent of the cost ``power``.
        ticket: token of a call; distinguishes a repeated call from a second sender with the same rank.
        b: weights of the target points, (l,); from all ranks or from none, for uniform weights.
        number: number of the call among those of this rank.
        received: number below which all calls of this rank have ended and will not be repeated.
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
        """Parameters that must be equal on all ranks."""
        return {
            "world size": self.world,
            "cost": self.cost,
            "power": self.power,
            "epsilon": self.epsilon,
            "solver": self.solver,
            "dimension": self.x.shape[1],
            "weights": "none" if self.b is None else "given",
        }

    @property
    def size(self) -> int:
        """Size of points and weights in bytes."""
        return self.x.nbytes + self.y.nbytes + (0 if self.b is None else self.b.nbytes)


@dataclass(eq=False)
class _Meeting:
    """The shares received for one problem."""

    name: tuple[str, str]
    world: int
    terms: dict[str, object]
    plan: asyncio.Future[tuple[TransportPlan, list[int]]]
    shares: dict[int, RankShare] = field(default_factory=dict)
    tickets: dict[int, str] = field(default_factory=dict)
    repeatable: dict[tuple[int, str], int] = field(default_factory=dict)
    """Calls that may be repeated: numbers by rank and ticket."""
    until: float = 0.0
    """Time at which the last of these calls expires, on the loop's clock."""
    solving: asyncio.Task[None] | None = None
    waiters: int = 0

    def missing(self) -> str:
        """Return the missing ranks, as text."""
        absent = [rank for rank in range(self.world) if rank not in self.shares]
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        return f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent[:8]))}{more}"

    def fault(self, share: RankShare) -> str | None:
        """Return why a share does not match this meeting, or None."""
        for what, agreed in self.terms.items():
            if share.terms[what] != agreed:
                others = ", ".join(map(str, sorted(self.tickets)))
                return f"rank {share.rank} has {what} {share.terms[what]}, rank {others} {agreed}"
        if self.tickets.get(share.rank, share.ticket) != share.ticket:
            return f"rank {share.rank} sent two shares"
        return None


class Rendezvous:
    """Collects the shares of the ranks of a job and solves global problems.

    A meeting ends with its plan or with its first error, which all ranks receive. If a response is lost, the rank
    repeats its call with the same ticket. Therefore a result is kept until every rank has confirmed it
    (:attr:`RankShare.received`) or its deadline has passed. The same key with another ticket starts a new meeting.

    Args:
        engine: engine that solves the problems. Its limits apply to each whole problem, to the bytes of all waiting
            shares, and to the kept results, of which the oldest are evicted.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._meetings: dict[tuple[str, str], _Meeting] = {}
        self._kept: dict[_Meeting, tuple[int, asyncio.TimerHandle]] = {}
        engine.metrics.meetings.set_function(lambda: self.meetings)

    @property
    def meetings(self) -> int:
        """Number of meetings without a plan."""
        return len(self._meetings)

    @property
    def kept(self) -> int:
        """Number of finished meetings whose results are kept for repeated calls."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Size of their plans in bytes."""
        return sum(size for size, _ in self._kept.values())

    async def bring(self, share: RankShare, deadline: float) -> RowBlock:
        """Submit a share, and wait for the other ranks and for the plan.

        Args:
            share: share of this rank.
            deadline: seconds to wait for the other ranks.

        Returns:
            This rank's rows of the plan over all ranks' points.

        Raises:
            RendezvousError: a rank is missing, sent two shares, or has other parameters; the same error on all ranks.
            TransportError: see :meth:`Engine.submit`; the same error on all ranks.
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
                f"received rank {share.rank} of world size {share.world}",
                hint=f"use ranks from 0, below a world size of at most {limits.world}",
            )
        if share.x.ndim != 2 or share.y.ndim != 2 or share.x.shape[1] != share.y.shape[1]:
            raise ProblemError(
                f"x has shape {share.x.shape}, y has shape {share.y.shape}",
                hint="use arrays of shapes (k, d) and (l, d) with the same d",
            )
        if share.b is not None and share.b.shape != share.y.shape[:1]:
            raise ProblemError(
                f"b: received shape {share.b.shape}, expected {share.y.shape[:1]}: one weight per target point"
            )
        self._engine.check((len(share.x), len(share.y)), share.size)

    def _confirm(self, share: RankShare) -> None:
        """Delete results that this rank was the last to receive."""
        for meeting in [meeting for meeting in self._kept if meeting.name[0] == share.job]:
            for (rank, ticket), number in list(meeting.repeatable.items()):
                if rank == share.rank and number < share.received:
                    del meeting.repeatable[rank, ticket]
            if not meeting.repeatable:
                self._discard(meeting)

    def _find(self, share: RankShare) -> _Meeting | None:
        """Return the finished meeting of a repeated call, or None."""
        name, call = (share.job, share.key), (share.rank, share.ticket)
        return next((meeting for meeting in self._kept if meeting.name == name and call in meeting.repeatable), None)

    def _join(self, share: RankShare, until: float) -> _Meeting:
        name = (share.job, share.key)
        meeting = self._meetings.get(name)
        if meeting is None:
            if len(self._meetings) >= self._engine.limits.queue:
                raise self._engine.busy(f"{len(self._meetings)} global problems waiting for ranks")
            meeting = _Meeting(name, share.world, share.terms, asyncio.get_running_loop().create_future())
        elif fault := meeting.fault(share):
            error = RendezvousError(
                f"{share.key} of {share.job}: {fault}", hint="start each rank once, all from the same spec"
            )
            self._expect(meeting, share, until)
            self._end(meeting, error)
            raise error
        if meeting.solving is None:
            # A repeated call replaces the one whose connection was lost.
            self._drop(meeting, share.rank)
            self._engine.reserve(share.size)
            self._meetings[name] = meeting
            meeting.shares[share.rank], meeting.tickets[share.rank] = share, share.ticket
            if len(meeting.shares) == share.world:
                meeting.solving = asyncio.get_running_loop().create_task(self._solve(meeting))
        self._expect(meeting, share, until)
        return meeting

    def _expect(self, meeting: _Meeting, share: RankShare, until: float) -> None:
        """Record a call that may be repeated."""
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
            # Samples of a generator never repeat, so the cache is not used.
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
            f"{key} of {job}: {meeting.missing()} did not send a share within {deadline:.3g} s",
            hint="see the log of that worker; if it is slow, raise MONGE_PLAN_DEADLINE",
        )
        self._end(meeting, error)

    def _end(self, meeting: _Meeting, error: MongeError) -> None:
        """Raise the same error in all waiting calls."""
        self._forget(meeting)
        if not meeting.plan.done():
            meeting.plan.set_exception(error)
            # After these errors, ranks retry with the same tickets.
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
