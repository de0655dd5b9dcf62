"""Sinkhorn's algorithm over row blocks held by several ranks of ``torch.distributed``.

Each rank holds its own rows. Column masses are summed over ranks, and all ranks take the same step with the same target
potentials. Ranks exchange m numbers per iteration: potentials are absorbed into the kernel, so that plain sums replace
log-sum-exps.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

import numpy as np
import torch

from pipelines import distributed
from pipelines.spec import CostName
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import sinkhorn
from pipelines.transport.solvers.iteration import Kernel
from pipelines.transport.solvers.rows import Working, extent_of
from pipelines.transport.solvers.sinkhorn import DENSE_BYTES, MAX_SWEEPS, TOLERANCE


class ShardedKernel(Kernel):
    """One rank's rows of a kernel."""

    def gather(self, parts: torch.Tensor, by: Literal["sum", "min"]) -> torch.Tensor:
        """See :class:`Kernel`."""
        return distributed.reduce_over_ranks(parts.clone(), by) if distributed.world_size() > 1 else parts


def solve(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epsilon: float,
    cost: CostName = "squared-euclidean",
    power: float = 2.0,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_SWEEPS,
) -> TransportPlan:
    """Compute this rank's rows of the entropic plan between the points of all ranks. Collective: every rank calls it.

    Args:
        x: this rank's source points, (k, ...), k ≥ 1.
        y: this rank's target points, (l, ...); those of all ranks are gathered in rank order.
        epsilon: entropic regularisation, > 0.
        cost: name of the cost.
        power: exponent of cost ``power``.
        tolerance: marginal error to reach over all ranks.
        max_iterations: maximum number of passes over the kernel.

    Returns:
        A plan of shape (k, m): this rank's rows, with total mass k / n, and the certificate of the whole plan.

    Raises:
        ProblemError: see :func:`pipelines.transport.solvers.sinkhorn.solve`.
        NotConvergedError: if the iteration does not converge; raised on all ranks.
    """
    started = time.perf_counter()
    targets = distributed.gather_rows(y)
    own = TransportProblem.between(x, targets, cost=cost, power=power, epsilon=epsilon)
    count = torch.tensor([len(x)], device=x.device)
    n = int(distributed.sum_over_ranks(count))
    # Weights of this rank's rows, which do not sum to 1.
    own = dataclasses.replace(own, a=np.full(len(x), 1 / n))
    sides = [torch.as_tensor(side) for side in (own.x, own.y)]
    # All ranks use the same unit, so that they take the same steps.
    centre = sides[1].double().mean(0)
    extent = torch.tensor([extent_of(*(side.double() - centre for side in sides))], device=x.device)
    dense = 16 * len(x) * len(targets) <= DENSE_BYTES
    solution = sinkhorn.certify(
        own,
        Working.of(own, float(distributed.gather_rows(extent).max())),
        lambda rows, weights: ShardedKernel(rows, weights.a, weights.b, keep=dense),
        tolerance=tolerance,
        max_iterations=max_iterations,
        start=None,
        streaming=not dense,
    )
    return solution.plan(own, "sinkhorn-sharded", started)
