"""The interface through which objectives request transport plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from pipelines import distributed
from pipelines.spec import CostName
from pipelines.transport.plan import RowBlock, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve


@dataclass(frozen=True, eq=False)
class Share:
    """One rank's part of a global transport problem.

    Attributes:
        key: identifies the problem, for example ``step-17``: the same on every rank, and unique within the job.
        x: this rank's source points, (k, ...), on any device; all source points have the same weight. Plans have no
            gradient.
        y: this rank's target points, (l, ...).
        cost: name of the cost.
        epsilon: entropic regularisation; 0 for the exact problem.
        power: exponent; only used by the cost ``power``.
        b: weights of this rank's target points, (l,); over all ranks they need not sum to 1. Uniform by default. Either
            all ranks pass weights or none does.
    """

    key: str
    x: torch.Tensor
    y: torch.Tensor
    cost: CostName = "squared-euclidean"
    epsilon: float = 0.0
    power: float = 2.0
    b: torch.Tensor | None = None


def dense_rows(block: RowBlock, rows: int, points: torch.Tensor) -> torch.Tensor:
    """Convert one rank's rows of a plan to a dense tensor.

    Args:
        block: this rank's rows.
        rows: number of this rank's source points.
        points: the target points of all ranks, (m, ...); gives m, the dtype and the device.

    Returns:
        (rows, m), with the device and the dtype of ``points``.
    """
    plan = points.new_zeros(rows, len(points))
    at = torch.as_tensor(block.rows, device=points.device), torch.as_tensor(block.columns, device=points.device)
    plan[at] = torch.as_tensor(block.mass, device=points.device).to(points.dtype)
    return plan


@runtime_checkable
class Planner(Protocol):
    """Solves transport problems, in this process or in the transport service.

    ``plan`` may be called from several threads at once. For an exact problem with uniform weights and n = m, the plan
    is a permutation: ``plan`` returns a plan with ``assignment``, and ``plan_rows`` one entry per row. A plan that did
    not converge is an error (:meth:`pipelines.transport.plan.Certificate.require_converged`).
    ``docs/how-to/solver.md`` has an example of a planner.
    """

    def plan(self, problem: TransportProblem) -> TransportPlan:
        """Solve one problem.

        Raises:
            TransportError: no plan of the requested accuracy was found.
        """
        ...

    def plan_rows(self, share: Share) -> RowBlock:
        """Solve the problem over all ranks' points and return this rank's rows of the plan.

        Collective: every rank calls it with the same key. The columns of the block are the target points of all ranks
        in rank order, as ``pipelines.distributed.gather_rows`` returns them.

        Raises:
            RendezvousError: a rank did not call it before the deadline.
            TransportError: as for :meth:`plan`; the same error is raised on every rank.
        """
        ...

    def plan_rows_each(self, shares: Sequence[Share]) -> list[RowBlock]:
        """Solve several problems as :meth:`plan_rows` does; every rank passes them in the same order."""
        ...


class LocalPlanner:
    """Solves plans in this process. Ranks gather all points with ``torch.distributed``, and each solves the problem."""

    def plan(self, problem: TransportProblem) -> TransportPlan:
        """See :class:`Planner`."""
        return solve(problem)

    def plan_rows(self, share: Share) -> RowBlock:
        """See :class:`Planner`."""
        # On the device of the points: NCCL cannot communicate CPU tensors.
        device = share.x.device
        sizes = distributed.gather_rows(torch.tensor([len(share.x)], device=device)).tolist()
        start = sum(sizes[: distributed.rank()])
        x, y = distributed.gather_rows(share.x), distributed.gather_rows(share.y)
        b = None if share.b is None else distributed.gather_rows(share.b.to(device))
        problem = TransportProblem.between(x, y, b=b, cost=share.cost, epsilon=share.epsilon, power=share.power)
        plan = solve(problem)
        return plan.block(start, start + len(share.x))

    def plan_rows_each(self, shares: Sequence[Share]) -> list[RowBlock]:
        """See :class:`Planner`; solves them one after the other, since collectives must be called in the same order."""
        return [self.plan_rows(share) for share in shares]
