"""Training of a generator by a transport distance whose cost is learned by a critic."""

from __future__ import annotations

import itertools
import time

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pipelines.distributed import gather_rows, gather_rows_with_gradient, world_size
from pipelines.errors import ProblemError
from pipelines.models.critics import Critic
from pipelines.models.network import Generator
from pipelines.objectives.diverged import diverged
from pipelines.objectives.gan import Images, samples
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.objectives.wasserstein import interpolates
from pipelines.spec import LearnedTransportSpec
from pipelines.transport.planner import Planner, Share, dense_rows
from pipelines.transport.precision import in_full_precision, wide

SLOPES = 4
"""The gradient penalty on the critic is computed for one image in ``SLOPES``."""

Points = Float[Tensor, "k d"]


class LearnedTransport:
    """``min_g max_c D(g, c)``: the central idea of the article, a second network that learns the cost of transport.

    The critic embeds images on the unit sphere, where the cost is ``1 − cos``. The distance is the minibatch energy
    distance between two halves x, x′ of the real images of a *global* batch and two halves y, y′ of the samples,

        D = W(x, y) + W(x, y′) + W(x′, y) + W(x′, y′) − 2 W(x, x′) − 2 W(y, y′)

    (Salimans et al. 2018, "Improving GANs using optimal transport", eq. 6). The last terms remove the cost of plans
    between finite samples of equal distributions. W is the cost of an entropic plan, which the planner solves and
    certifies. The generator minimises D at every step with fixed plans. The critic maximises D less often, minus a
    penalty ``E ‖Jᵀv‖²`` on the gradient of its embedding between images and samples; without it, the critic can
    separate two sets that hardly differ.

    In a healthy run ``within_real`` and ``within_generated`` stay away from 0. If they vanish, the critic maps all real
    images to one pole of the sphere and all samples to the other, and the generator has no gradient.

    Args:
        spec: epsilon, penalty and frequency of critic updates.
        generator: generator to train.
        critic: critic with several features.
        planner: solver of the plans.
    """

    served = "generator"

    def __init__(self, spec: LearnedTransportSpec, generator: Generator, critic: Critic, planner: Planner) -> None:
        self.spec = spec
        self.generator = generator
        self.critic = critic
        self.planner = planner
        self.networks = {"generator": generator, "critic": critic}
        self.phases = [
            Phase("critic", critic, self._critic_loss, every=spec.critic_every, optimizer=spec.critic.optimizer),
            Phase("generator", generator, self._generator_loss),
        ]

    def _critic_loss(self, step: Step) -> Loss:
        fakes = samples(self.generator, step, "critic's latents")
        distance = self._distance(step, fakes, "critic")
        loss = -distance.total
        if self.spec.penalty:
            loss = loss + self.spec.penalty * self._penalty(step, fakes)
        return Loss(loss, maxima=distance.maxima)

    def _generator_loss(self, step: Step) -> Loss:
        return self._distance(step, self.generator(step.normal("latents", self.generator.latent)), "generator")

    def _embed(self, images: Images) -> Points:
        return F.normalize(wide(self.critic(images)), dim=1)

    def _distance(self, step: Step, fakes: Images, player: str) -> Loss:
        """Energy distance over all ranks' images and samples, differentiable with respect to this rank's."""
        return self._between(step, self._embed(torch.cat([step.images.to(fakes.dtype), fakes])), player)

    @in_full_precision
    def _between(self, step: Step, embedded: Points, player: str) -> Loss:
        """Energy distance of embedded images and samples, which are concatenated in ``embedded``."""
        even = step.share.start % 2  # the first place of this rank that is even in the global batch
        sides = {
            name + prime: points[first::2]
            for name, points in zip("xy", embedded.chunk(2), strict=True)
            for prime, first in (("", even), ("'", 1 - even))
        }
        everywhere = {name: gather_rows_with_gradient(points) for name, points in sides.items()}
        pairs = list(itertools.combinations(sides, 2))
        shares = [
            Share(
                f"step-{step.index}-{player}-{one}{other}",
                sides[one].detach(),
                sides[other].detach(),
                "cosine",
                self.spec.epsilon,
            )
            for one, other in pairs
        ]
        started = time.perf_counter()
        try:
            blocks = self.planner.plan_rows_each(shares)
        except ProblemError as error:
            raise diverged(step.index, "features of the critic", error.args[0]) from error
        waited = time.perf_counter() - started
        costs: dict[str, Tensor] = {}
        for (one, other), block in zip(pairs, blocks, strict=True):
            plan = dense_rows(block, len(sides[one]), everywhere[other].detach())
            costs[one + other] = (gather_rows(plan) * (1 - everywhere[one] @ everywhere[other].T)).sum()
        between = costs["xy"] + costs["xy'"] + costs["x'y"] + costs["x'y'"]
        distance = between - 2 * costs["xx'"] - 2 * costs["yy'"]
        curves = {
            "energy_distance": distance,
            "between": between / 4,
            "within_real": costs["xx'"],
            "within_generated": costs["yy'"],
            "plan_wait_ms": torch.tensor(1e3 * waited),
            "plan_solve_ms": torch.tensor(sum(block.certificate.milliseconds for block in blocks)),
        }
        # Every rank has the global distance, and curves are summed over ranks.
        sums = {name: value.detach() / world_size() for name, value in curves.items()}
        return Loss(distance, sums, {"plan_relative_gap": max(block.certificate.relative_gap for block in blocks)})

    def _penalty(self, step: Step, fakes: Images) -> Tensor:
        """This rank's part of ``E ‖Jᵀv‖²`` over standard normal v: the mean squared gradient of the features."""
        chosen = slice(-step.share.start % SLOPES, None, SLOPES)
        images = interpolates(step, fakes)[chosen].requires_grad_()
        direction = step.normal("directions", self.critic.features)[chosen]
        (slopes,) = torch.autograd.grad((self._embed(images) * direction).sum(), images, create_graph=True)
        return slopes.float().square().sum() / len(range(0, step.batch, SLOPES))
