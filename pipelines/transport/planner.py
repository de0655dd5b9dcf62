"""The one interface by which an objective asks for a plan."""

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
    """What one rank holds of a global problem.

    Attributes:
        key: names the problem; every rank gives the same one, and no two problems of a job share it.
        x: this rank's source points, (k, ...).
        y: this rank's target points, (l, ...).
        cost: name of the cost.
        epsilon: entropic regularisation; 0 for the exact problem.
        power: the exponent of cost ``power``.
        b: weights of this rank's target points, (l,), of which all ranks' need not sum to 1; uniform by default, then
            on every rank.
    """

    key: str
    x: torch.Tensor
    y: torch.Tensor
    cost: CostName = "squared-euclidean"
    epsilon: float = 0.0
    power: float = 2.0
    b: torch.Tensor | None = None


def dense_rows(block: RowBlock, rows: int, points: torch.Tensor) -> torch.Tensor:
    """One rank's rows of a plan as an array, (rows, m), of the device and the precision of all m target points."""
    plan = points.new_zeros(rows, len(points))
    at = torch.as_tensor(block.rows, device=points.device), torch.as_tensor(block.columns, device=points.device)
    plan[at] = torch.as_tensor(block.mass, device=points.device).to(points.dtype)
    return plan


@runtime_checkable
class Planner(Protocol):
    """Solves transport problems: in this process, or in a service."""

    def plan(self, problem: TransportProblem) -> TransportPlan:
        """Solve one problem.

        Raises:
            TransportError: a plan that is not what was asked for is never returned.
        """
        ...

    def plan_rows(self, share: Share) -> RowBlock:
        """Solve the problem over all ranks' points, and return this rank's rows of its plan.

        Every rank calls it with the same key. Columns of the block count over all ranks' target points in rank order,
        the order in which ``pipelines.distributed.gather_rows`` returns them.

        Raises:
            RendezvousError: a rank did not come.
            TransportError: as for :meth:`plan`; every rank gets the same error.
        """
        ...

    def plan_rows_each(self, shares: Sequence[Share]) -> list[RowBlock]:
        """Solve several problems at once, each as :meth:`plan_rows` does; every rank gives them in the same order."""
        ...


class LocalPlanner:
    """Plans in this process; ranks exchange points by ``torch.distributed`` and each solves the same problem."""

    def plan(self, problem: TransportProblem) -> TransportPlan:
        """See :class:`Planner`."""
        return solve(problem)

    def plan_rows(self, share: Share) -> RowBlock:
        """See :class:`Planner`."""
        # Where the points are: a group of NCCL alone exchanges nothing that is on the CPU.
        device = share.x.device
        sizes = distributed.gather_rows(torch.tensor([len(share.x)], device=device)).tolist()
        start = sum(sizes[: distributed.rank()])
        x, y = distributed.gather_rows(share.x), distributed.gather_rows(share.y)
        b = None if share.b is None else distributed.gather_rows(share.b.to(device))
        problem = TransportProblem.between(x, y, b=b, cost=share.cost, epsilon=share.epsilon, power=share.power)
        plan = solve(problem)
        return plan.block(start, start + len(share.x))

    def plan_rows_each(self, shares: Sequence[Share]) -> list[RowBlock]:
        """See :class:`Planner`; one after the other, for ranks meet in an order."""
        return [self.plan_rows(share) for share in shares]
