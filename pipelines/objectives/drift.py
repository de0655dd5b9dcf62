"""Drift of generated points towards real ones, computed from transport plans."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipelines.distributed import gather_rows, sum_over_ranks
from pipelines.errors import ProblemError
from pipelines.objectives.diverged import diverged
from pipelines.objectives.features import FeatureMap, Points, RealPoints
from pipelines.spec import SinkhornDistanceSpec, TransportSpec
from pipelines.transport.cost import with_known_conditions
from pipelines.transport.plan import RowBlock
from pipelines.transport.planner import Planner, Share, dense_rows
from pipelines.transport.precision import in_full_precision


@dataclass(frozen=True, eq=False)
class DriftStats:
    """Statistics of the plans of one drift; the same on every rank.

    Attributes:
        squares: mean squared length of the drift over all ranks' points, before normalisation, ().
        cost: mean cost of the plans to real points.
        within: cost of the plan among generated points; None without a self term.
        waited: seconds spent waiting for the plans.
        solved: milliseconds of their solvers.
        relative_gap: largest relative duality gap of the plans.
    """

    squares: Float[Tensor, ""]
    cost: float
    within: float | None
    waited: float
    solved: float
    relative_gap: float


@dataclass(frozen=True, eq=False)
class Cloud:
    """This rank's generated points.

    Attributes:
        points: (k, d), detached.
        labels: requested classes, (k,).
        places: position of each point in its batch, (k,); the even and the odd positions are the two halves.
        before: number of points of the odd half on lower ranks.
        total: number of points of all ranks.
    """

    points: Points
    labels: Int64[Tensor, " k"]
    places: Int64[Tensor, " k"]
    before: int
    total: int


class DriftField:
    """Computes the drift of generated points: the negative gradient of their distance to real points.

    For the squared Euclidean cost and fixed plans (envelope theorem, Peyré & Cuturi 2019, prop. 9.2), the negative
    gradient at a point x_i is proportional to ``T_real(x_i) - T_generated(x_i)``. Here ``T(x_i)``, which is
    ``Σ_j P_ij y_j / Σ_j P_ij``, is the barycentric projection of x_i under a plan P. The first term attracts generated
    points to real ones, the second one keeps generated points apart.

    With ``self_term: same-batch``, the second plan is between the batch and itself, as in the Sinkhorn divergence
    (Feydy et al. 2019, eq. 3). With ``two-batch``, the batch is split into two halves: each has a plan to the real
    points, and the second plan is between the halves. No point is then compared with itself, and the bias of finite
    batches cancels if there are as many real points as points in a half.

    Plans are solved between points of reduced dimension (:meth:`FeatureMap.reduced`); the drift is between full ones.

    Args:
        spec: distance and self term.
        planner: solves the plans, between the points of all ranks.
        features: map from images to points.
        reals: points of the training images.
        classes: number of classes of a conditional generator, else 0.
    """

    def __init__(
        self, spec: TransportSpec, planner: Planner, features: FeatureMap, reals: RealPoints, classes: int
    ) -> None:
        self._spec = spec
        self._planner = planner
        self._features = features
        self._reals = reals
        self._classes = classes

    @in_full_precision
    def compute(self, step: int, cloud: Cloud, chosen: Int64[Tensor, " l"]) -> tuple[Points, DriftStats]:
        """The drift of this rank's points, (k, d), and its statistics. Collective: every rank calls it.

        Args:
            step: index of the step; names the problems, so that it must differ between calls.
            cloud: this rank's generated points.
            chosen: indices of this rank's real images in the training split, (l,).

        Raises:
            DivergedError: the points are not finite.
            TransportError: a plan cannot be solved.
        """
        real, target = self._reals.take(chosen)
        halves = self._halves(cloud)
        sides = [cloud.points[half] for half in halves]
        ends = [self._features.reduced(side) for side in sides]
        if self._spec.condition_weight:
            ends = [self._with_classes(end, cloud.labels[half]) for end, half in zip(ends, halves, strict=True)]
            target = self._with_classes(target, self._reals.labels(chosen))
        pairs = [(f"{number}z", end, target) for number, end in enumerate(ends)] + self._within(ends)
        started = time.perf_counter()
        blocks = self._plans(step, pairs)
        waited = time.perf_counter() - started

        everywhere = gather_rows(real)
        to_real = [
            _means(dense_rows(block, len(end), everywhere), everywhere)
            for end, block in zip(ends, blocks, strict=False)
        ]
        directions = torch.zeros_like(cloud.points)
        within = self._own_means(sides, blocks[len(ends) :], cloud.before)
        for half, means, own in zip(halves, to_real, within, strict=True):
            directions[half] = means - own
        squares = sum_over_ranks(directions.square().sum()) / cloud.total
        if self._spec.normalise:
            directions = directions * (squares + 1e-12).rsqrt()
        costs = [block.certificate.primal for block in blocks]
        return directions, DriftStats(
            squares,
            cost=sum(costs[: len(ends)]) / len(ends),
            within=costs[-1] if len(costs) > len(ends) else None,
            waited=waited,
            solved=sum(block.certificate.milliseconds for block in blocks),
            relative_gap=max(block.certificate.relative_gap for block in blocks),
        )

    def _halves(self, cloud: Cloud) -> list[Tensor | slice]:
        """Indices of the points of each half; of all points if the batch is not split."""
        if self._spec.self_term == "same-batch":
            return [slice(None)]
        return [torch.nonzero(cloud.places % 2 == half).flatten().to(cloud.points.device) for half in (0, 1)]

    @property
    def _has_self_term(self) -> bool:
        # Without regularisation, the plan between a batch and itself is the identity.
        return self._spec.self_term == "two-batch" or isinstance(self._spec.distance, SinkhornDistanceSpec)

    def _within(self, ends: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        return [("within", ends[0], ends[-1])] if self._has_self_term else []

    def _with_classes(self, points: Points, labels: Tensor) -> Float[Tensor, "k e"]:
        """Points with their classes appended as coordinates, so that plans across classes cost more."""
        return with_known_conditions(points, labels, self._classes, self._spec.condition_weight)

    def _plans(self, step: int, pairs: Sequence[tuple[str, Tensor, Tensor]]) -> list[RowBlock]:
        epsilon = self._spec.distance.epsilon if isinstance(self._spec.distance, SinkhornDistanceSpec) else 0.0
        shares = [Share(f"step-{step}-{name}", x, y, epsilon=epsilon) for name, x, y in pairs]
        try:
            return self._planner.plan_rows_each(shares)
        except ProblemError as error:
            raise diverged(step, "features of samples", error.args[0]) from error

    def _own_means(self, sides: Sequence[Tensor], within: Sequence[RowBlock], before: int) -> list[Tensor]:
        """Barycentric projections of this rank's points, of each half, under the plan between generated points."""
        if not within:
            return list(sides)
        first, last = gather_rows(sides[0]), gather_rows(sides[-1])
        plan = dense_rows(within[0], len(sides[0]), last)
        found = [_means(plan, last)]
        if len(sides) == 2:
            # The transposed plan maps the second half to the first.
            found.append(_means(gather_rows(plan).T[before : before + len(sides[1])], first))
        return found


def _means(plan: Float[Tensor, "n m"], points: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
    """Barycentric projection of each row of a plan."""
    return plan @ points / plan.sum(1, keepdim=True)
