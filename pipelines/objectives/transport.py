"""A generator trained by the optimal-transport distance between its samples and real images."""

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
    """``min_w Distance({g_w(y_i)}, {z_i})``: the article's second chapter, for the *global* minibatch.

    - ``exact``: the optimal plan between samples and real images is asked of the planner; by the envelope theorem the
      gradient of the distance is that of the plan's cost with the plan held fixed (Peyré & Cuturi 2019, prop. 9.2);
    - ``sinkhorn-divergence``: of Feydy et al. 2019, eq. 3, as a generator's loss in Genevay, Peyré & Cuturi 2018,
      "Learning generative models with Sinkhorn divergences"; every rank solves it for itself;
    - ``sliced``: :func:`sliced_distance`, along lines that are a function of the job's seed and the step.

    Real images may weigh by their classes: the generator then learns a law in which the classes have other frequencies
    than in the data, along weighted plans (Kantorovich's problem) that may split the mass of a sample between images.

    Args:
        spec: the distance and its cost.
        generator: what is trained.
        planner: who solves exact plans.
        weights: of an image by its class, (classes,); None where all images weigh the same.
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
        """The distance between all ranks' points, on every rank; differentiable in this rank's samples."""
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
        # Every rank has the whole distance, while curves are summed over ranks.
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
            # Real images are bytes, as many as samples, and weigh something: only samples that are not finite make no
            # problem.
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
        """What this rank's images weigh; all the same in a batch none of whose classes weighs anything."""
        if self.weights is None:
            return None
        own = self.weights.to(step.labels.device)[step.labels]
        return torch.where(gather_rows(own).any(), own, 1.0)


def sliced_distance(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Mean squared transport distance of projections on lines, where sorting is optimal: differentiable in both sides.

    Rabin et al. (2012), "Wasserstein barycenter and its application to texture mixing"; Bonneel et al. (2015), eq. 4.

    Args:
        x: (n, d) float.
        y: (n, d).
        directions: (d, k), of any lengths > 0.

    Returns:
        A scalar, at most the squared Euclidean transport cost.
    """
    units = directions / directions.norm(dim=0)
    return ((x @ units).sort(0).values - (y @ units).sort(0).values).square().mean()
