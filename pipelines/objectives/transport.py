"""A generator trained by the optimal-transport distance between its samples and real images."""

from __future__ import annotations

import time

import torch

from pipelines.distributed import gather_rows, world_size
from pipelines.errors import DivergedError, ProblemError
from pipelines.models.network import Generator
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.spec import TransportSpec
from pipelines.transport.cost import matched_cost
from pipelines.transport.planner import Planner, Share


class TransportObjective:
    """``min_w Distance({g_w(y_i)}, {z_i})``: the article's second chapter, for the minibatch.

    At each step the optimal plan between the samples and the real images of the *global* batch is asked of the
    planner; by the envelope theorem the gradient of the distance is that of the plan's cost with the plan held fixed
    (Peyré & Cuturi 2019, prop. 9.2).

    Args:
        spec: the cost.
        generator: what is trained.
        planner: who solves the plans.
    """

    served = "generator"

    def __init__(self, spec: TransportSpec, generator: Generator, planner: Planner) -> None:
        self.spec = spec
        self.generator = generator
        self.planner = planner
        self.networks = {"generator": generator}
        self.phases = [Phase("generator", generator, self._loss)]

    def _loss(self, step: Step) -> Loss:
        samples = self.generator(step.normal("latents", self.generator.latent)).flatten(1)
        real = step.images.flatten(1)
        started = time.perf_counter()
        share = Share(
            key=f"step-{step.index}",
            x=samples.detach(),
            y=real,
            cost=self.spec.cost,
            epsilon=0.0,
            power=self.spec.power,
        )
        try:
            block = self.planner.plan_rows(share)
        except ProblemError as error:
            # Real images are bytes, and as many as samples: only samples that are not finite make no problem.
            raise DivergedError(
                f"at step {step.index} the generator's samples make no transport problem: {error.args[0]}",
                cure="lower optimizer.learning_rate",
            ) from error
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
