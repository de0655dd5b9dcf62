"""Planners that use the transport service, over Ray or over HTTP."""

from __future__ import annotations

import random
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import httpx
import numpy as np

from pipelines.distributed import from_first_rank
from pipelines.errors import BusyError, MongeError, ServiceError
from pipelines.transport.plan import RowBlock, TransportPlan
from pipelines.transport.planner import Share
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName
from pipelines.transport.verify import verify
from services.error_documents import read_error
from services.tokens import authorization
from services.transport import wire
from services.transport.cache import sketch
from services.transport.engine import flat, in_memory
from services.transport.npz import write_npz
from services.transport.rendezvous import RankShare

Answer = TypeVar("Answer", TransportPlan, RowBlock)

GRACE = 2.0
"""Seconds beyond its deadline that a call waits for the error that names the missing ranks."""

LONGEST_PAUSE = 2.0

SPARES_KNOWN = 5.0
"""Seconds for which a client caches the list of spare replicas."""


class _LostError(ServiceError):
    """The connection to the service was lost during a call, which may be repeated."""


def shared_attempt() -> str:
    """Return a token chosen by rank 0: the same on all ranks of this attempt of a job, and new for each attempt.

    It separates the shares of a restarted job from those of earlier attempts. Without ``torch.distributed``, each
    process is a separate attempt.
    """
    return from_first_rank(uuid.uuid4().hex)


class _Calls:
    """Numbers calls, which may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._open: set[int] = set()

    @contextmanager
    def one(self) -> Iterator[tuple[int, int]]:
        """Yield the number of a call, and the number below which all calls have ended."""
        with self._lock:
            number = self._next
            self._next += 1
            self._open.add(number)
            ended = min(self._open)
        try:
            yield number, ended
        finally:
            with self._lock:
                self._open.discard(number)


class _RemotePlanner(ABC):
    """Base class of remote planners. Repeats calls while the service is busy or unreachable, until the deadline.

    Args:
        job: name of the job.
        rank: rank of this process.
        world: number of ranks.
        deadline: time limit of a call in seconds, including waiting for other ranks.
        attempt: token that is the same on all ranks and new after a restart; chosen through ``torch.distributed`` if
            None, and then all ranks must construct their planners at the same time.
        solver: name of a solver, or ``auto``.
        verify: whether to verify each plan of :meth:`plan` locally, with a few matrix products and O(n + m)
            memory beyond the points; see :func:`pipelines.transport.verify.verify`. Rows of a global plan are not
            verified: no rank has all points.
    """

    def __init__(
        self,
        job: str,
        rank: int = 0,
        world: int = 1,
        deadline: float = 60.0,
        *,
        attempt: str | None = None,
        solver: SolverName = "auto",
        verify: bool = False,
    ) -> None:
        self.job, self.rank, self.world, self.deadline, self.solver = job, rank, world, deadline, solver
        self.verify = verify
        self._calls = _Calls()
        self._meeting_place = f"{job}/{shared_attempt() if attempt is None else attempt}"

    def plan(self, problem: TransportProblem) -> TransportPlan:
        """See :class:`pipelines.transport.planner.Planner`.

        Raises:
            ServiceError: the service did not respond before the deadline.
            TransportError: the service reports this error.
            CertificateError: verification is enabled, and the certificate does not match the plan.
        """
        problem = in_memory(problem)
        # The response omits the points: the caller has them.
        plan = self._insist(lambda remaining: self._plan(problem, remaining)).between(problem)
        if self.verify:
            verify(problem, plan)
        return plan

    def plan_rows(self, share: Share) -> RowBlock:
        """See :class:`pipelines.transport.planner.Planner`.

        Raises:
            RendezvousError: a rank is missing at the deadline; the message names it.
            ServiceError: the service did not respond before the deadline.
            TransportError: the service reports this error, the same on every rank.
        """
        started = time.perf_counter()
        with self._calls.one() as (number, received):
            brought = RankShare(
                self._meeting_place,
                share.key,
                self.rank,
                self.world,
                flat(share.x),
                flat(share.y),
                share.cost,
                share.epsilon,
                self.solver,
                power=share.power,
                ticket=uuid.uuid4().hex,
                b=None if share.b is None else share.b.detach().cpu().numpy(),
                number=number,
                received=received,
            )
            block = self._insist(lambda remaining: self._bring(brought, remaining))
        return replace(block, waited=time.perf_counter() - started)

    def plan_rows_each(self, shares: Sequence[Share]) -> list[RowBlock]:
        """See :class:`pipelines.transport.planner.Planner`; the calls run concurrently.

        Raises:
            MongeError: the first error of :meth:`plan_rows`.
        """
        with ThreadPoolExecutor(max(1, len(shares)), thread_name_prefix="plans") as pool:
            return list(pool.map(self.plan_rows, shares))

    @abstractmethod
    def _plan(self, problem: TransportProblem, remaining: float) -> TransportPlan: ...

    @abstractmethod
    def _bring(self, share: RankShare, remaining: float) -> RowBlock: ...

    def _insist(self, call: Callable[[float], Answer]) -> Answer:
        until = time.monotonic() + self.deadline
        pause = 0.05
        while True:
            try:
                return call(max(0.0, until - time.monotonic()))
            except BusyError as error:
                fault: MongeError = error
                # Random, so that clients do not all retry at the same time.
                wait = error.retry_after * random.uniform(0.8, 1.2)
            except _LostError as error:
                fault = error
                wait, pause = pause, min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() + wait >= until:
                if isinstance(fault, BusyError):
                    raise fault
                raise ServiceError(
                    f"the transport service was unreachable for {self.deadline:g} s: {fault.args[0]}",
                    hint="run `monge up` or check the address; to wait longer, raise MONGE_PLAN_DEADLINE or `deadline`",
                ) from fault
            time.sleep(wait)


class RayPlanner(_RemotePlanner):
    """Planner that calls the service's actors on the Ray cluster that this process has joined."""

    _replicas: dict[str, Any]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._replicas = {}
        self._spares: tuple[float, dict[str, Any]] = (-SPARES_KNOWN, {})

    def _plan(self, problem: TransportProblem, remaining: float) -> TransportPlan:
        content = sketch(problem, self.solver)
        return self._ask(content, "plan", (problem, self.job, self.solver), remaining, spares=True)

    def _bring(self, share: RankShare, remaining: float) -> RowBlock:
        return self._ask(self.job.encode(), "bring", (share, remaining), remaining + GRACE, spares=False)

    def _known(self, *, spares: bool) -> dict[str, Any]:
        """Return the actors by name; with ``spares``, also the spare ones, updated every few seconds."""
        import ray

        from services.transport.actor import find_replicas, handle

        # Local, because several threads may call this method.
        replicas = self._replicas or {name: handle(name) for name in find_replicas()}
        self._replicas = replicas
        if not spares:
            return replicas
        heard, known = self._spares
        if time.monotonic() - heard > SPARES_KNOWN:
            names = ray.get(next(iter(replicas.values())).spares.remote(), timeout=SPARES_KNOWN)
            known = {name: handle(name) for name in names}
            self._spares = (time.monotonic(), known)
        return replicas | known

    def _ask(self, content: bytes, method: str, arguments: tuple[Any, ...], timeout: float, *, spares: bool) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        from services.transport.actor import replica_of

        try:
            replicas = self._known(spares=spares)
        except ServiceError as error:
            raise _LostError(error.args[0], hint=error.hint) from None
        except RayError as error:
            self._replicas = {}
            raise _LostError(str(error).splitlines()[0]) from error
        actor = replicas[replica_of(content, list(replicas))]
        answer = getattr(actor, method).remote(*arguments)
        try:
            return _owned(ray.get(answer, timeout=timeout))
        except GetTimeoutError:
            ray.cancel(answer)
            raise _no_plan(self.deadline) from None
        except RayTaskError as error:
            if isinstance(error.cause, ServiceError):
                raise _LostError(str(error.cause.args[0]), hint=error.cause.hint) from None
            if isinstance(error.cause, MongeError):
                raise error.cause from None
            raise ServiceError(f"the transport service failed: {error.cause!r}") from error
        except RayError as error:
            # A service that was restarted has new actors.
            self._replicas, self._spares = {}, (-SPARES_KNOWN, {})
            raise _LostError(str(error).splitlines()[0]) from error


def _no_plan(deadline: float) -> ServiceError:
    return ServiceError(
        f"no plan within {deadline:g} s",
        hint="raise the planner's `deadline` (MONGE_PLAN_DEADLINE in jobs), or use smaller problems",
    )


def _owned(answer: Any) -> Any:
    """Return the response with copies of its arrays: Ray returns read-only views of its memory."""
    arrays = {field.name: getattr(answer, field.name) for field in fields(answer)}
    return replace(answer, **{name: part.copy() for name, part in arrays.items() if isinstance(part, np.ndarray)})


class HttpPlanner(_RemotePlanner):
    """Planner that calls the service over HTTP.

    Args:
        url: URL of the service, such as ``http://127.0.0.1:8100``.
        job, rank, world, deadline, attempt, solver, verify: see the base class.
        secret: token for a service that is not on loopback: ``settings.secret``.
        client: httpx client with its own headers, for tests.
    """

    def __init__(
        self,
        url: str,
        job: str = "",
        *args: Any,
        secret: str | None = None,
        client: httpx.Client | None = None,
        **options: Any,
    ) -> None:
        super().__init__(job, *args, **options)
        # Ignore proxies from the environment.
        self._client = client or httpx.Client(base_url=url, headers=authorization(secret), trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _plan(self, problem: TransportProblem, remaining: float) -> TransportPlan:
        needless = () if problem.matrix is None else ("x", "y", "cost", "power")
        said = {name: value for name, value in vars(problem).items() if value is not None and name not in needless}
        body = write_npz(said | {"solver": self.solver})
        return wire.read_plan(self._post("/v1/plans?potentials=true", body, remaining))

    def _bring(self, share: RankShare, remaining: float) -> RowBlock:
        said = {name: value for name, value in vars(share).items() if value is not None}
        body = write_npz(said | {"deadline": remaining})
        return wire.read_rows(self._post("/v1/shares", body, remaining + GRACE))

    def _post(self, path: str, body: bytes, timeout: float) -> bytes:
        headers = {"Content-Type": wire.NPZ, "X-Monge-Client": self.job}
        try:
            answer = self._client.post(path, content=body, headers=headers, timeout=timeout)
        except httpx.TimeoutException:
            raise _no_plan(self.deadline) from None
        except httpx.TransportError as error:
            raise _LostError(f"the transport service at {self._client.base_url} is unreachable: {error}") from error
        if answer.status_code == 200:
            return answer.content
        fault = read_error(answer.content, answer.status_code, "the transport service")
        if type(fault) is ServiceError:  # those below it are refusals, which another try would meet again
            raise _LostError(str(fault.args[0]), hint=fault.hint)
        raise fault
