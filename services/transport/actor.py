"""The transport service as detached Ray actors: found by name, restarted when they die."""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from typing import Any

import ray
import torch
from prometheus_client import Metric
from ray.exceptions import RayError
from ray.util import list_named_actors

from pipelines.errors import ServiceError
from pipelines.transport.plan import RowBlock, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName
from services.settings import NAMESPACE
from services.transport.engine import Engine, cores
from services.transport.limits import Limits
from services.transport.rendezvous import RankShare, Rendezvous

NAME = "transport"
SPARE = f"{NAME}-spare"
RESOURCE = "transport"
"""Resource of nodes on which the service may run."""

CALLS = 10_000
"""Maximum number of concurrent calls of an actor; waiting calls take no thread."""


class TransportActor:
    """One replica: an engine and the rendezvous of the jobs assigned to it.

    Points arrive as read-only views of the node's shared memory; only indices and masses are returned.

    Args:
        limits: limits on requests.
        workers: number of solver threads.
        threads: number of torch threads for a large problem that is solved alone; by default one per core.
    """

    def __init__(self, limits: Limits, workers: int, threads: int | None) -> None:
        # Solvers only read their points.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        torch.set_num_threads(1)
        self._engine = Engine(limits, workers=workers, threads=threads or cores())
        self._rendezvous = Rendezvous(self._engine)
        self._spares: list[str] = []

    async def plan(self, problem: TransportProblem, client: str, solver: SolverName) -> TransportPlan:
        """See :meth:`Engine.submit`."""
        return await self._engine.submit(problem, client, solver)

    async def bring(self, share: RankShare, deadline: float) -> RowBlock:
        """See :meth:`Rendezvous.bring`."""
        return await self._rendezvous.bring(share, deadline)

    async def meetings(self) -> int:
        """Return the number of global problems without a plan."""
        return self._rendezvous.meetings

    async def load(self) -> int:
        """Return the number of problems that wait or are being solved."""
        return self._engine.load

    async def publish(self, spares: list[str]) -> None:
        """Store the names of the spare replicas; see :mod:`services.transport.scaling`."""
        self._spares = spares

    async def spares(self) -> list[str]:
        """Return the names of the spare replicas."""
        return self._spares

    async def limits(self) -> Limits:
        """Return the limits on requests."""
        return self._engine.limits

    async def metrics(self) -> list[Metric]:
        """Return the metrics of this replica."""
        return list(self._engine.metrics.registry.collect())


def replica_names(replicas: int) -> list[str]:
    """Return the names of the actors: ``transport``, or ``transport-0 … transport-(k−1)``."""
    return [NAME] if replicas == 1 else [f"{NAME}-{index}" for index in range(replicas)]


def find_replicas() -> list[str]:
    """Return the names of the existing replicas, in order, including restarting ones but not spare ones.

    Raises:
        ServiceError: there are no replicas.
    """
    pattern = re.compile(rf"{NAME}(-\d+)?")
    names = [
        actor["name"]
        for actor in list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and pattern.fullmatch(actor["name"])
    ]
    if not names:
        raise ServiceError(
            "no transport service is running on this Ray cluster", hint="run `monge up` or `monge transport serve`"
        )
    return sorted(names, key=lambda name: (len(name), name))


def replica_of(content: bytes, names: list[str]) -> str:
    """Return the replica for a job's name or a problem's sketch."""
    return names[int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % len(names)]


def handle(name: str) -> Any:
    """Return the actor with a name.

    Raises:
        ServiceError: no such actor is running.
    """
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        raise ServiceError(f"no actor {name!r} is running on this Ray cluster", hint="run `monge up`") from None


def start_replicas(
    replicas: int = 1,
    limits: Limits | None = None,
    *,
    resource: float = 1.0,
    workers: int = 2,
    threads: int | None = None,
    timeout: float = 60.0,
    created: list[str] | None = None,
) -> None:
    """Get or create the actors, and wait until they respond.

    Args:
        replicas: number of actors.
        limits: limits on requests.
        resource: amount of the ``transport`` resource per actor.
        workers: number of solver threads per actor.
        threads: number of torch threads for a problem that is solved alone.
        timeout: seconds to wait for a node with the resource, and for the actors.
        created: receives the names of new actors before they are started, so that the caller can stop them after an
            error.

    Raises:
        ServiceError: no node offers the resource, or the actors did not start.
    """
    until = time.monotonic() + timeout
    names = replica_names(replicas)
    absent = [name for name in names if not _exists(name)]
    while absent and ray.cluster_resources().get(RESOURCE, 0) < resource * replicas:
        if time.monotonic() > until:
            offered = ray.cluster_resources().get(RESOURCE, 0)
            raise ServiceError(
                f"the nodes of this Ray cluster offer {offered:g} of the resource {RESOURCE!r}, "
                f"{replicas} replicas require {resource:g} each",
                hint=f"start a node with `ray start --resources='{{\"{RESOURCE}\": {resource * replicas:g}}}'`",
            )
        time.sleep(0.2)
    if created is not None:
        created += absent
    actors = [create(name, resource, limits, workers, threads) for name in names]
    for name, actor in zip(names, actors, strict=True):
        fault = wait_for(actor, until)
        if fault is not None:
            stop_replicas(absent)
            raise ServiceError(
                f"{name} did not respond within {timeout:g} s: {fault}",
                hint="see the logs of the actors in the Ray dashboard",
            )


def create(
    name: str, resource: float, limits: Limits | None = None, workers: int = 2, threads: int | None = None
) -> Any:
    """Get or create an actor without waiting for it; see :func:`start_replicas`."""
    remote: Any = ray.remote(TransportActor)
    return remote.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=CALLS,
        num_cpus=0,
        resources={RESOURCE: resource},
    ).remote(limits or Limits(), workers, threads)


def wait_for(actor: Any, until: float) -> str | None:
    """Wait for an actor, which may be restarting; return the error if it does not respond."""
    while True:
        try:
            ray.get(actor.limits.remote(), timeout=max(0.0, until - time.monotonic()))
        except RayError as error:
            if time.monotonic() >= until:
                return str(error).splitlines()[0]
            time.sleep(0.1)
        else:
            return None


def stop_replicas(names: list[str]) -> None:
    """Stop actors permanently."""
    for name in names:
        if _exists(name):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def _exists(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True
