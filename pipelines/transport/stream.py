"""Pairs of points along optimal plans, solved ahead of the training that consumes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.errors import ProblemError
from pipelines.spec import CostName
from pipelines.transport.plan import Certificate
from pipelines.transport.planner import Planner
from pipelines.transport.problem import TransportProblem

Draw = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Function from the index of a pool to its sources and targets, (n, ...) each."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """One batch of a coupling.

    Attributes:
        x: source points, (k, ...).
        y: targets of the source points, (k, ...).
        sources: indices of the sources in their pool, (k,) int64.
        targets: indices of the targets in their pool, (k,) int64, consecutive.
        pool: index of the pool.
        certificate: certificate of the plan of the pool.
        waited: seconds spent waiting for the plan.
    """

    x: torch.Tensor
    y: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    pool: int
    certificate: Certificate
    waited: float


@dataclass(frozen=True, eq=False)
class _Pool:
    x: torch.Tensor
    y: torch.Tensor
    sources: torch.Tensor
    certificate: Certificate


class CouplingStream:
    """Batches of pairs along Monge maps between pools much larger than a batch.

    For objectives whose couplings do not depend on the weights, such as flow matching (Pooladian et al. 2023,
    "Multisample flow matching"; Tong et al. 2024). The next plans are solved while the current one is used, and
    training waits only if solving a plan takes longer than all the steps that use it.

    Batches follow the order of the targets, which keeps labels and other data of the targets aligned; the targets
    should therefore be drawn in random order. The batch of a step depends only on the step: a stream can resume at any
    step, and all ranks that create the same stream get the same batches, of which each takes its rows. If all ranks
    request the same plans from a transport service, it solves each plan once.

    Args:
        planner: solver of the plans; called from background threads.
        draw: function that draws the points of a pool; called from background threads, so it must not share a random
            generator with other threads.
        pool: number of points on each side of a pool, a multiple of ``batch``.
        batch: number of pairs in a batch.
        cost: name of the cost.
        ahead: number of plans solved ahead of the current one; 1 is right for a planner in this process.
        steps: number of steps, if known; later plans are not solved.

    Raises:
        ProblemError: ``pool`` is not a multiple of ``batch``, or ``ahead`` or ``steps`` is not positive.
    """

    def __init__(
        self,
        planner: Planner,
        draw: Draw,
        *,
        pool: int,
        batch: int,
        cost: CostName = "squared-euclidean",
        ahead: int = 1,
        steps: int | None = None,
    ) -> None:
        if batch < 1 or pool < batch or pool % batch:
            raise ProblemError(
                f"a pool of {pool} does not divide into batches of {batch}", hint="make it a multiple of the batch"
            )
        for name, value in (("ahead", ahead), ("steps", steps)):
            if value is not None and value < 1:
                raise ProblemError(f"{name}: {value} received", hint="give at least 1")
        self.pool, self.batch, self.ahead = pool, batch, ahead
        self._last = None if steps is None else (steps - 1) * batch // pool
        self._planner, self._draw, self._cost = planner, draw, cost
        self._threads = ThreadPoolExecutor(ahead, thread_name_prefix="coupling")
        self._plans: dict[int, Future[_Pool]] = {}

    def at(self, step: int) -> Pairs:
        """The batch of a step; for consecutive steps, the plans are solved ahead.

        Args:
            step: index of the step, from 0; steps may be requested in any order.

        Raises:
            TransportError: the plan of the step's pool could not be computed; the next call tries again.
        """
        number, place = divmod(step, self.pool // self.batch)
        ahead = number + self.ahead
        wanted = range(number, 1 + (ahead if self._last is None else max(number, min(ahead, self._last))))
        for passed in [index for index in self._plans if index not in wanted]:
            self._plans.pop(passed).cancel()
        for index in wanted:
            if index not in self._plans:
                self._plans[index] = self._threads.submit(self._solve, index)
        started = time.perf_counter()
        try:
            pool = self._plans[number].result()
        except Exception:
            del self._plans[number]
            raise
        waited = time.perf_counter() - started
        targets = torch.arange(place * self.batch, (place + 1) * self.batch)
        sources = pool.sources[targets]
        return Pairs(pool.x[sources], pool.y[targets], sources, targets, number, pool.certificate, waited)

    def close(self) -> None:
        """Cancel the plans ahead; plans that are being solved still finish."""
        self._plans.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> CouplingStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _solve(self, number: int) -> _Pool:
        x, y = self._draw(number)
        if len(x) != self.pool or len(y) != self.pool:
            raise ProblemError(f"pool {number} has {len(x)} sources and {len(y)} targets, {self.pool} were promised")
        plan = self._planner.plan(TransportProblem.between(x, y, cost=self._cost))
        if plan.assignment is None:
            raise ProblemError(f"pool {number}: {plan.certificate.solver} gave no permutation")
        return _Pool(x, y, torch.as_tensor(np.argsort(plan.assignment)), plan.certificate)
