"""A generator trained by the transport distance between features of its samples and of real images."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.data.partition import rank_slice
from pipelines.distributed import gather_rows, rank, sum_over_ranks, world_size
from pipelines.errors import DivergedError, ProblemError
from pipelines.models.network import Generator
from pipelines.objectives.features import Features, Points, RealPoints
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.randomness import step_generator
from pipelines.spec import SinkhornDistanceSpec, TransportSpec
from pipelines.transport.cost import with_known_conditions
from pipelines.transport.plan import RowBlock
from pipelines.transport.planner import Planner, Share, dense_rows
from pipelines.transport.precision import in_full_precision


class FeatureTransport:
    """``min_w Distance({φ(g_w(y_i))}, {φ(z_i)})`` for a fixed map φ to features, without adversary.

    Samples follow the gradient of the distance, which has a simple form: with the plans held fixed (envelope theorem,
    Peyré & Cuturi 2019, prop. 9.2), the point ``φ(x)`` of a sample moves along its *drift*: the mean of the real points
    that its row of the plan gives it, less the mean of the generated points that a plan among samples gives it. The
    second term keeps samples apart. It is that of the Sinkhorn divergence (Feydy et al. 2019, eq. 3) where samples are
    compared with themselves; where one half of them is compared with the other, both plans are between points that have
    not met, and the bias of finite batches cancels where there are as many real images as samples in a half.

    The batch is global: plans are between all ranks' samples and all real images, whichever rank holds them.

    Args:
        spec: distance, self term, and number of real images.
        generator: what is trained.
        planner: who solves the plans.
        features: φ.
        reals: points of the training images.
    """

    served = "generator"

    def __init__(
        self, spec: TransportSpec, generator: Generator, planner: Planner, features: Features, reals: RealPoints
    ) -> None:
        self.spec = spec
        self.generator = generator
        self.planner = planner
        self.features = features
        self.reals = reals
        self.networks = {"generator": generator}
        self.phases = [Phase("generator", generator, self._loss)]

    def _loss(self, step: Step) -> Loss:
        asked = self.generator.asked(step.labels)
        samples = self.generator(step.normal("latents", self.generator.latent), asked)
        return self._along_drift(step, self.features(samples))

    @in_full_precision
    def _along_drift(self, step: Step, points: Points) -> Loss:
        indices = self._chosen(step)
        real, target = self.reals.take(indices)
        halves = self._halves(step)
        sides = [points.detach()[half] for half in halves]
        ends = [self.features.reduced(side) for side in sides]
        if self.spec.condition_weight:
            ends = [self._with_classes(end, step.labels[half]) for end, half in zip(ends, halves, strict=True)]
            target = self._with_classes(target, self.reals.labels(indices))
        pairs = [(f"{number}z", end, target) for number, end in enumerate(ends)] + self._within(ends)
        started = time.perf_counter()
        blocks = self._plans(step, pairs)
        waited = time.perf_counter() - started

        everywhere = gather_rows(real)
        to_real = [
            _means(dense_rows(block, len(end), everywhere), everywhere)
            for end, block in zip(ends, blocks, strict=False)
        ]
        drift = torch.zeros_like(points)
        for half, means, within in zip(halves, to_real, self._own_means(step, sides, blocks[len(ends) :]), strict=True):
            drift[half] = means - within
        squares = drift.square().sum()
        if self.spec.normalise:
            drift = drift * (sum_over_ranks(squares.clone()) / step.batch + 1e-12).rsqrt()
        loss = -2 * (points * drift).sum() / step.batch
        costs = [block.certificate.primal for block in blocks]
        curves = {
            "transport_cost": sum(costs[: len(ends)]) / len(ends),
            "plan_wait_ms": 1e3 * waited,
            "plan_solve_ms": sum(block.certificate.milliseconds for block in blocks),
        }
        if len(costs) > len(ends):
            curves["within_generated"] = costs[-1]
        # Every rank has the whole of these, while curves are summed over ranks.
        sums: dict[str, Tensor | float] = {name: value / world_size() for name, value in curves.items()}
        sums["drift"] = squares / step.batch
        return Loss(loss, sums, {"plan_relative_gap": max(block.certificate.relative_gap for block in blocks)})

    def _chosen(self, step: Step) -> Tensor:
        """Places of this rank's real images in the training split, (k,)."""
        if self.spec.reals is None:
            return step.indices
        drawn = torch.randint(
            len(self.reals), (self.spec.reals,), generator=step_generator(step.seed, step.index, "real images")
        )
        return drawn[rank_slice(self.spec.reals, rank(), world_size())]

    def _halves(self, step: Step) -> list[slice]:
        """This rank's places of the samples that are compared with one another: all, or of each half."""
        if self.spec.self_term == "same-batch":
            return [slice(None)]
        even = step.share.start % 2  # the first place of this rank that is even in the global batch
        return [slice(even, None, 2), slice(1 - even, None, 2)]

    @property
    def _has_self_term(self) -> bool:
        # The exact plan of points with themselves leaves each where it is.
        return self.spec.self_term == "two-batch" or isinstance(self.spec.distance, SinkhornDistanceSpec)

    def _within(self, ends: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        return [("within", ends[0], ends[-1])] if self._has_self_term else []

    def _with_classes(self, points: Points, labels: Tensor) -> Float[Tensor, "k e"]:
        """Points of a conditional model as plans compare them, with their classes as further coordinates."""
        return with_known_conditions(points, labels, self.generator.conditions, self.spec.condition_weight)

    def _plans(self, step: Step, pairs: Sequence[tuple[str, Tensor, Tensor]]) -> list[RowBlock]:
        epsilon = self.spec.distance.epsilon if isinstance(self.spec.distance, SinkhornDistanceSpec) else 0.0
        shares = [Share(f"step-{step.index}-{name}", x, y, epsilon=epsilon) for name, x, y in pairs]
        try:
            return self.planner.plan_rows_each(shares)
        except ProblemError as error:
            raise DivergedError(
                f"at step {step.index} the features of the generator's samples make no transport problem: "
                f"{error.args[0]}",
                cure="lower optimizer.learning_rate",
            ) from error

    def _own_means(self, step: Step, sides: Sequence[Tensor], within: Sequence[RowBlock]) -> list[Tensor]:
        """For this rank's samples, of each half: the mean of the generated points that a plan gives them."""
        if not within:
            return list(sides)
        first, last = gather_rows(sides[0]), gather_rows(sides[-1])
        plan = dense_rows(within[0], len(sides[0]), last)
        found = [_means(plan, last)]
        if len(sides) == 2:
            # The columns of the plan are the rows of the way back.
            odd_before = step.share.start // 2
            found.append(_means(gather_rows(plan).T[odd_before : odd_before + len(sides[1])], first))
        return found


def _means(plan: Float[Tensor, "n m"], points: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
    """Of each row of a plan, the mean of the points that it sends its mass to (barycentric projection)."""
    return plan @ points / plan.sum(1, keepdim=True)
