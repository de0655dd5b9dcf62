"""HTTP gateway to the actors of a Ray cluster."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import ray
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from ray.exceptions import RayError, RayTaskError

from pipelines.errors import MongeError, ServiceError
from pipelines.transport.plan import RowBlock, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName
from services.transport.actor import handle, replica_of
from services.transport.cache import sketch
from services.transport.limits import Limits
from services.transport.rendezvous import RankShare

REPORTING = 5.0
"""Timeout of an actor's response with its limits or metrics, in seconds."""

LONGEST_PAUSE = 1.0


class RayBackend:
    """Forwards requests to replicas: shares by the name of the job, problems by their content.

    Args:
        names: names of the actors.
        patience: seconds for which a request is retried while replicas restart.
    """

    def __init__(self, names: list[str], patience: float = 60.0) -> None:
        self._permanent, self._patience = names, patience
        self.spares: list[str] = []
        """Names of spare replicas; see :mod:`services.transport.scaling`."""

    async def plan(self, problem: TransportProblem, client: str, solver: SolverName) -> TransportPlan:
        """See :class:`services.transport.backend.Backend`; uses the next replica if one dies."""
        content = await asyncio.to_thread(sketch, problem, solver)
        names = self._names
        first = names.index(replica_of(content, names))
        order = names[first:] + names[:first]
        plan: TransportPlan = await self._insist(order, "plan", problem, client, solver)
        return plan

    async def bring(self, share: RankShare, deadline: float) -> RowBlock:
        """See :class:`services.transport.backend.Backend`; waits for a replica that restarts."""
        block: RowBlock = await self._insist(
            [replica_of(share.job.encode(), self._permanent)], "bring", share, deadline
        )
        return block

    async def limits(self) -> Limits:
        """See :class:`services.transport.backend.Backend`."""
        limits: Limits = await self._first("limits")
        return limits

    async def metrics(self) -> bytes:
        """See :class:`services.transport.backend.Backend`; combines all replicas that respond, labelled by name."""
        names = self._names
        answers = await asyncio.gather(
            *(asyncio.wait_for(_ask(name, "metrics"), REPORTING) for name in names), return_exceptions=True
        )
        counted = {name: answer for name, answer in zip(names, answers, strict=True) if isinstance(answer, list)}
        registry = CollectorRegistry()
        registry.register(_Replicas(counted))
        return generate_latest(registry)

    async def close(self) -> None:
        """See :class:`services.transport.backend.Backend`; does not stop the actors."""

    @property
    def _names(self) -> list[str]:
        return self._permanent + self.spares

    async def _first(self, method: str) -> Any:
        """Return the response of any replica."""
        faults = []
        for name in self._permanent:
            try:
                return await asyncio.wait_for(_ask(name, method), REPORTING)
            except (ServiceError, RayError, TimeoutError) as error:
                faults.append(f"{name}: {str(error).splitlines()[0] if str(error) else 'no response'}")
        raise ServiceError("; ".join(faults), hint="check `monge status`; replicas restart after a failure")

    async def _insist(self, names: list[str], method: str, *arguments: Any) -> Any:
        until, pause = time.monotonic() + self._patience, 0.05
        for name in itertools.cycle(names):
            try:
                return await _ask(name, method, *arguments)
            except RayError as error:
                fault = str(error).splitlines()[0]
            if time.monotonic() + pause > until:
                raise ServiceError(f"{name} is unreachable: {fault}", hint="retry later: it is being restarted")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("unreachable")


async def _ask(name: str, method: str, *arguments: Any) -> Any:
    """Call an actor; forward its errors, and cancel the call if this one is cancelled."""
    answer = getattr(await asyncio.to_thread(handle, name), method).remote(*arguments)
    try:
        return await answer
    except asyncio.CancelledError:
        ray.cancel(answer)
        raise
    except RayTaskError as error:
        if isinstance(error.cause, MongeError):
            raise error.cause from None
        raise ServiceError(f"{name} failed: {error.cause!r}") from error


class _Replicas(Collector):
    """Combines the metrics of several processes, distinguished by a label."""

    def __init__(self, counted: dict[str, list[Metric]]) -> None:
        self._counted = counted

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, metrics in self._counted.items():
            for metric in metrics:
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.samples.append(sample._replace(labels=sample.labels | {"replica": replica}))
        yield from families.values()
