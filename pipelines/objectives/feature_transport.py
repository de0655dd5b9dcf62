"""Training of a generator by the transport distance between features of its samples and of real images."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.data.partition import rank_slice
from pipelines.distributed import gather_rows, rank, world_size
from pipelines.models.network import Generator
from pipelines.models.normalisation import GlobalBatchNorm
from pipelines.objectives.drift import Cloud, DriftField, DriftStats
from pipelines.objectives.features import FeatureMap, RealPoints
from pipelines.objectives.phase import POOL, Loss, Phase, Step
from pipelines.randomness import step_generator
from pipelines.spec import TransportSpec
from pipelines.transport.planner import Planner


@dataclass(frozen=True, eq=False)
class _Pool:
    """This rank's share of a pool of samples, for each step that trains on it.

    Attributes:
        number: index of the pool.
        latents: latent vectors, (steps, k, latent).
        labels: requested classes, (steps, k).
        targets: targets of the points of the samples, (steps, k, d).
        drift: statistics of the plans.
    """

    number: int
    latents: Tensor
    labels: Tensor
    targets: Tensor
    drift: DriftStats


class FeatureTransport:
    """``min_w Distance({φ(g_w(y_i))}, {φ(z_i)})`` for a fixed map φ to features, without adversary.

    Samples follow the gradient of the distance: the point ``φ(x)`` of a sample moves along its drift, see
    :class:`DriftField`. The batch is global: plans are between the samples and the real images of all ranks.

    Plans can be between many more samples than a batch: a *pool* of them is drawn without gradient, by a copy of the
    generator, and its plans are solved once. The steps that follow train on the samples of the pool, a batch at a time,
    and move their points to targets given by the drift of the pool (squared distance to a fixed target, as in W-Flow,
    arXiv 2605.11755). A pool costs one more forward pass per sample, and memory for the points of its samples and for
    dense plans between them. The copy is saved with the generator, so that a resumed run computes the same targets (on
    another number of workers, up to rounding).

    Args:
        spec: distance, self term, and numbers of samples and of real images.
        generator: generator to train.
        planner: solver of the plans.
        features: map φ.
        reals: points of the training images.
    """

    served = "generator"

    def __init__(
        self, spec: TransportSpec, generator: Generator, planner: Planner, features: FeatureMap, reals: RealPoints
    ) -> None:
        self.spec = spec
        self.generator = generator
        self.features = features
        self.reals = reals
        self.drift_field = DriftField(spec, planner, features, reals, generator.conditions)
        self.networks: dict[str, nn.Module] = {"generator": generator}
        self._pool: _Pool | None = None
        if spec.pool is not None:
            self.networks[POOL] = self._copy = _Copy(generator)
        self.phases = [Phase("generator", generator, self._loss if spec.pool is None else self._pooled_loss)]

    def _loss(self, step: Step) -> Loss:
        labels, chosen = self._compared(step)
        samples = self.generator(step.normal("latents", self.generator.latent), self.generator.asked(labels))
        points = self.features(samples)
        cloud = Cloud(points.detach(), labels, _places(step), step.share.start // 2, step.batch)
        directions, drift = self.drift_field.compute(step.index, cloud, chosen)
        return _told(-2 * (points * directions).sum() / step.batch, drift)

    def _compared(self, step: Step) -> tuple[Tensor, Tensor]:
        """Classes of this rank's samples, and places of its real images in the training split.

        Both sides of a plan hold the classes in the same proportions. Otherwise some mass must change its class, and
        Sinkhorn's algorithm needs many more iterations.
        """
        if self.spec.reals is not None:
            drawn = self._drawn(step.seed, step.index, self.spec.reals)
            asked = self._asked(drawn, step.batch)[step.share] if self.generator.conditions else step.labels
            return asked, drawn[_own(self.spec.reals)]
        if not self.generator.conditions or self._halves == 1:
            return step.labels, step.indices
        places = _places(step)
        return gather_rows(step.labels)[places // 2 * 2], step.indices[places % 2 == 0]

    @property
    def _halves(self) -> int:
        return 2 if self.spec.self_term == "two-batch" else 1

    def _asked(self, drawn: Tensor, samples: int) -> Tensor:
        """Classes for this many samples, (samples,), in the same proportions as the real images, within each half."""
        return self.reals.labels(drawn[torch.arange(samples) // self._halves % len(drawn)])

    def _pooled_loss(self, step: Step) -> Loss:
        assert self.spec.pool is not None
        number, place = divmod(step.index, self.spec.pool // step.batch)
        new = self._pool is None or self._pool.number != number
        if new:
            self._pool = None  # free the old pool first: two pools need twice the memory
            self._copy.follow(self.generator, number, self.spec.pool, step.batch, step.seed)
            self._pool = self._drawn_pool(step, number)
        assert self._pool is not None
        pool = self._pool
        points = self.features(self.generator(pool.latents[place], self.generator.asked(pool.labels[place])))
        loss = (points - pool.targets[place]).square().sum() / step.batch
        return _told(loss, pool.drift, solved_now=new)

    @torch.no_grad()
    def _drawn_pool(self, step: Step, number: int) -> _Pool:
        """Draw the samples of a pool with the copy of the generator, and compute their targets. Collective."""
        assert self.spec.pool is not None
        steps, device = self.spec.pool // step.batch, step.images.device
        reals = self.spec.reals or self.spec.pool // self._halves
        drawn = self._drawn(step.seed, number, reals)
        noise = torch.randn(
            self.spec.pool, self.generator.latent, generator=step_generator(step.seed, number, "pool of latents")
        )
        latents = noise.unflatten(0, (steps, -1))[:, step.share].to(device)
        labels = self._asked(drawn, self.spec.pool).unflatten(0, (steps, -1))[:, step.share]
        found = [
            self.features(self._copy(own, self.generator.asked(classes)))
            for own, classes in zip(latents, labels, strict=True)
        ]
        points = torch.cat(found)
        odd_before = steps * (step.share.start // 2)
        cloud = Cloud(points, labels.flatten(), _places(step).repeat(steps), odd_before, self.spec.pool)
        directions, drift = self.drift_field.compute(step.index, cloud, drawn[_own(reals)])
        return _Pool(number, latents, labels, (points + directions).unflatten(0, (steps, -1)), drift)

    def _drawn(self, seed: int, number: int, count: int) -> Tensor:
        """Draw indices of real images from the whole training split, the same on all ranks, (count,)."""
        return torch.randint(len(self.reals), (count,), generator=step_generator(seed, number, "real images"))


def _own(count: int) -> slice:
    return rank_slice(count, rank(), world_size())


def _places(step: Step) -> Tensor:
    return torch.arange(step.share.start, step.share.stop)


def _told(loss: Tensor, drift: DriftStats, solved_now: bool = True) -> Loss:
    curves: dict[str, Tensor | float] = {
        "transport_cost": drift.cost,
        "plan_wait_ms": 1e3 * drift.waited * solved_now,
        "plan_solve_ms": drift.solved * solved_now,
        "drift": drift.squares,
    }
    if drift.within is not None:
        curves["within_generated"] = drift.within
    # Every rank has the global values, and curves are summed over ranks.
    sums: dict[str, Tensor | float] = {name: value / world_size() for name, value in curves.items()}
    return Loss(loss, sums, {"plan_relative_gap": drift.relative_gap})


class _Copy(nn.Module):
    """Copy of the generator from the time when a pool was drawn.

    It normalises by the statistics of its input batch, as in training, and its buffers do not change. It stores the
    pool for which it was copied: a resumed run draws the same pool again, and a run with other pools copies again.
    """

    drawn: Tensor

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = copy.deepcopy(generator).requires_grad_(False).eval()
        for module in self.generator.modules():
            if isinstance(module, GlobalBatchNorm):
                module.train()
                module.track_running_stats = False
        self.register_buffer("drawn", torch.full((4,), -1, device=next(generator.parameters()).device))

    def follow(self, generator: Generator, *pool: int) -> None:
        """Copy the current weights, unless the copy for this pool exists already."""
        if self.drawn.tolist() != list(pool):
            self.generator.load_state_dict(generator.state_dict())
            self.drawn.copy_(torch.tensor(pool))

    def forward(self, latents: Tensor, conditions: Tensor | None) -> Tensor:
        """Samples, (b, latent) → (b, c, h, w)."""
        samples: Tensor = self.generator(latents, conditions)
        return samples
