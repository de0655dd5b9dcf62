"""Global plans: the ranks of a job bring their points, one problem is solved over all, each gets its rows."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

import numpy as np

from pipelines.errors import MongeError, ProblemError, RendezvousError, ServiceError
from pipelines.transport.plan import RowBlock, TransportPlan
from pipelines.transport.problem import CostName, TransportProblem
from pipelines.transport.solve import SolverName
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

    A meeting ends with its plan or with its first error, which every rank that has come receives; then it is
    forgotten, and the same key opens a new one.

    Args:
        engine: solves the problems; its limits hold for each whole problem, and for the bytes of all shares that wait.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._meetings: dict[tuple[str, str], _Meeting] = {}
        engine.metrics.meetings.set_function(lambda: self.meetings)

    @property
    def meetings(self) -> int:
        """How many have no plan yet."""
        return len(self._meetings)

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
        meeting = self._join(share)
        alarm = asyncio.get_running_loop().call_later(
            min(deadline, self._engine.limits.deadline), self._give_up, meeting, deadline
        )
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
                cure=f"give ranks from 0, below a world size of at most {limits.world}",
            )
        if share.x.ndim != 2 or share.y.ndim != 2 or share.x.shape[1] != share.y.shape[1]:
            raise ProblemError(
                f"x has shape {share.x.shape}, y has shape {share.y.shape}",
                cure="give arrays of shape (k, d) and (l, d), of the same d",
            )
        if share.b is not None and share.b.shape != share.y.shape[:1]:
            raise ProblemError(
                f"b: shape {share.b.shape} received, {share.y.shape[:1]} expected: one weight for each target"
            )
        self._engine.check((len(share.x), len(share.y)), share.size)

    def _join(self, share: RankShare) -> _Meeting:
        name = (share.job, share.key)
        meeting = self._meetings.get(name)
        if meeting is None:
            if len(self._meetings) >= self._engine.limits.queue:
                raise self._engine.busy(f"{len(self._meetings)} global problems wait for their ranks")
            meeting = _Meeting(name, share.world, share.terms, asyncio.get_running_loop().create_future())
        elif fault := meeting.fault(share):
            error = RendezvousError(
                f"{share.key} of {share.job}: {fault}", cure="start every rank from the same spec, each rank once"
            )
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
        meeting.waiters += 1
        return meeting

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
                meeting.plan.set_result((plan.between(problem), starts))

    def _give_up(self, meeting: _Meeting, deadline: float) -> None:
        if meeting.solving is not None or meeting.plan.done():
            return
        self._engine.metrics.timeouts.inc()
        key, job = meeting.name[1], meeting.name[0]
        error = RendezvousError(
            f"{key} of {job}: {meeting.missing()} did not come within {deadline:.3g} s",
            cure="look at that worker's log; a slow one needs a larger MONGE_PLAN_DEADLINE",
        )
        self._end(meeting, error)

    def _end(self, meeting: _Meeting, error: MongeError) -> None:
        """Give all who wait the same error."""
        self._forget(meeting)
        if not meeting.plan.done():
            meeting.plan.set_exception(error)

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
