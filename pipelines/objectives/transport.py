"""Training of a generator by the optimal transport distance between its samples and real images."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from pipelines.distributed import gather_rows, gather_rows_with_gradient, world_size
from pipelines.errors import ProblemError
from pipelines.models.network import Generator
from pipelines.objectives.diverged import diverged
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.randomness import step_generator
from pipelines.spec import SinkhornDistanceSpec, SlicedDistanceSpec, TransportSpec
from pipelines.transport.cost import matched_cost
from pipelines.transport.divergence import sinkhorn_divergence
from pipelines.transport.planner import Planner, Share
from pipelines.transport.precision import in_full_precision, wide


class TransportObjective:
    """``min_w Distance({g_w(y_i)}, {z_i})``: chapter 2 of the article, for the *global* minibatch.

    - ``exact``: the planner solves the optimal plan between samples and real images; by the envelope theorem, the
      gradient of the distance is that of the cost of the fixed plan (Peyré & Cuturi 2019, prop. 9.2);
    - ``sinkhorn-divergence``: the divergence of Feydy et al. 2019, eq. 3, as a loss of generators in Genevay, Peyré &
      Cuturi 2018, "Learning generative models with Sinkhorn divergences"; every rank solves it;
    - ``sliced``: :func:`sliced_distance`, along lines that are a function of the job's seed and the step.

    Real images may have weights by class. The generator then learns a distribution whose class frequencies differ from
    those of the data; the weighted plans (Kantorovich's problem) may split the mass of a sample between images.

    Args:
        spec: distance and cost.
        generator: generator to train.
        planner: solver of exact plans.
        weights: weight of an image by class, (classes,); None for uniform weights.
    """

    served = "generator"

    def __init__(
        self, spec: TransportSpec, generator: Generator, planner: Planner, weights: Tensor | None = None
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.generator = generator
        self.planner = planner
        self.networks = {"generator": generator}
        self.phases = [Phase("generator", generator, self._loss)]

    def _loss(self, step: Step) -> Loss:
        samples = wide(self.generator(step.normal("latents", self.generator.latent)).flatten(1))
        real = step.images.flatten(1)
        match self.spec.distance:
            case SinkhornDistanceSpec() | SlicedDistanceSpec():
                return self._over_all_ranks(step, samples, real)
        return self._along_plan(step, samples, real)

    @in_full_precision
    def _over_all_ranks(self, step: Step, samples: Tensor, real: Tensor) -> Loss:
        """Distance between all ranks' points, on every rank; differentiable with respect to this rank's samples."""
        x, y = gather_rows_with_gradient(samples), gather_rows(real).to(samples.dtype)
        if not bool(torch.isfinite(x).all()):
            raise diverged(step.index, "samples", "they are not finite")
        distance = self.spec.distance
        if isinstance(distance, SlicedDistanceSpec):
            lines = torch.randn(
                x.shape[1], distance.directions, generator=step_generator(step.seed, step.index, "directions")
            )
            loss = sliced_distance(x, y, lines.to(x))
        else:
            assert isinstance(distance, SinkhornDistanceSpec)
            own = self._masses(step)
            b = None if own is None else gather_rows(own)
            loss = sinkhorn_divergence(x, y, epsilon=distance.epsilon, b=b, cost=self.spec.cost, power=self.spec.power)
        # Every rank has the global distance, and curves are summed over ranks.
        return Loss(loss, sums={"transport_cost": loss.detach() / world_size()})

    @in_full_precision
    def _along_plan(self, step: Step, samples: Tensor, real: Tensor) -> Loss:
        started = time.perf_counter()
        share = Share(
            key=f"step-{step.index}",
            x=samples.detach(),
            y=real,
            cost=self.spec.cost,
            epsilon=0.0,
            power=self.spec.power,
            b=self._masses(step),
        )
        try:
            block = self.planner.plan_rows(share)
        except ProblemError as error:
            # Real images are bytes, as many as samples, with positive total weight: the problem is only invalid if the
            # samples are not finite.
            raise diverged(step.index, "samples", error.args[0]) from error
        waited = time.perf_counter() - started
        rows, columns, mass = (torch.as_tensor(a).to(samples.device) for a in (block.rows, block.columns, block.mass))
        costs = matched_cost(samples[rows], gather_rows(real)[columns], self.spec.cost, self.spec.power)
        loss = (mass.to(costs.dtype) * costs).sum()
        return Loss(
            loss,
            sums={
                "transport_cost": loss.detach(),
                "plan_wait_ms": 1e3 * waited / world_size(),
                "plan_solve_ms": block.certificate.milliseconds / world_size(),
            },
            maxima={"plan_relative_gap": block.certificate.relative_gap},
        )

    def _masses(self, step: Step) -> Tensor | None:
        """Weights of this rank's images; uniform if all classes of the batch have weight 0."""
        if self.weights is None:
            return None
        own = self.weights.to(step.labels.device)[step.labels]
        return torch.where(gather_rows(own).any(), own, 1.0)


def sliced_distance(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Mean squared transport distance of projections onto lines, where sorting is optimal; differentiable.

    Rabin et al. (2012), "Wasserstein barycenter and its application to texture mixing"; Bonneel et al. (2015), eq. 4.

    Args:
        x: points of one side, (n, d) float.
        y: points of the other side, (n, d).
        directions: directions of the lines, (d, k), of any lengths > 0.

    Returns:
        A scalar, at most the squared Euclidean transport cost.
    """
    units = directions / directions.norm(dim=0)
    return ((x @ units).sort(0).values - (y @ units).sort(0).values).square().mean()
