"""Backends of the HTTP server: an engine in its process, or the actors of a Ray cluster."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import generate_latest

from pipelines.transport.plan import RowBlock, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName
from services.transport.engine import Engine
from services.transport.limits import Limits
from services.transport.rendezvous import RankShare, Rendezvous


class Backend(Protocol):
    """Solver backend of the HTTP server. Cancelling a call frees its place in the queue."""

    async def plan(self, problem: TransportProblem, client: str, solver: SolverName) -> TransportPlan:
        """See :meth:`services.transport.engine.Engine.submit`."""
        ...

    async def bring(self, share: RankShare, deadline: float) -> RowBlock:
        """See :meth:`services.transport.rendezvous.Rendezvous.bring`."""
        ...

    async def limits(self) -> Limits:
        """Return the limits on requests.

        Raises:
            ServiceError: no replica responds.
        """
        ...

    async def metrics(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        ...

    async def close(self) -> None:
        """Reject waiting requests."""
        ...


class LocalBackend:
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rendezvous = Rendezvous(engine)

    async def plan(self, problem: TransportProblem, client: str, solver: SolverName) -> TransportPlan:
        """See :class:`Backend`."""
        return await self._engine.submit(problem, client, solver)

    async def bring(self, share: RankShare, deadline: float) -> RowBlock:
        """See :class:`Backend`."""
        return await self._rendezvous.bring(share, deadline)

    async def limits(self) -> Limits:
        """See :class:`Backend`."""
        return self._engine.limits

    async def metrics(self) -> bytes:
        """See :class:`Backend`."""
        return generate_latest(self._engine.metrics.registry)

    async def close(self) -> None:
        """See :class:`Backend`."""
        await self._engine.close()
