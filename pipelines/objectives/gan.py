"""Generative adversarial networks: a generator against a critic that discriminates its samples from real images."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pipelines.models.critics import Critic
from pipelines.models.network import Generator
from pipelines.models.orthogonal import overlap
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.spec import GanSpec

Images = Float[Tensor, "k c h w"]
Scores = Float[Tensor, "k 1"]
Conditions = Float[Tensor, "k classes"]


class Gan:
    """Two phases, of the critic and of the generator, on the same batch of images and different latent vectors.

    - ``zero-sum``: the critic maximises ``V = E log D(x) + E log(1 − D(g(y)))`` with ``D = σ(critic)``, and the
      generator minimises it (Goodfellow et al. 2014, eq. 1).
    - ``non-saturating``: the generator minimises ``−E log D(g(y))`` instead (ibid., section 3), whose gradient does not
      vanish if the critic is confident.
    - ``hinge``: the critic minimises ``E (1 − c(x))₊ + E (1 + c(g(y)))₊``, the generator ``−E c(g(y))`` (Lim & Ye
      2017, eq. 18; Miyato et al. 2018, eq. 16).

    A conditional generator samples the classes of the batch's images, and the critic gets the same classes.

    For the first two losses, ``V + log 4`` with the optimal critic is twice the Jensen–Shannon divergence between
    samples and images (Goodfellow et al. 2014, theorem 1). The curve ``equilibrium_gap`` is therefore a lower bound of
    it, and 0 at the equilibrium.

    Args:
        spec: loss and number of critic updates.
        generator: generator to train.
        critic: critic with one output.
    """

    served = "generator"

    def __init__(self, spec: GanSpec, generator: Generator, critic: Critic) -> None:
        self.spec = spec
        self.generator = generator
        self.critic = critic
        self.networks = {"generator": generator, "critic": critic}
        self.phases = [
            Phase("critic", critic, self._critic_loss, optimizer=spec.critic.optimizer),
            Phase("generator", generator, self._generator_loss, every=spec.critic_steps),
        ]

    def _critic_loss(self, step: Step) -> Loss:
        asked = self.generator.asked(step.labels)
        real, fake = scores(self.critic, step.images, samples(self.generator, step, "critic's latents"), asked)
        if self.spec.loss == "hinge":
            each = F.relu(1 - real) + F.relu(1 + fake)
        else:
            each = F.softplus(-real) + F.softplus(fake)
        loss = each.sum() / step.batch
        right = ((real > 0).sum() + (fake < 0).sum()) / (2 * step.batch)
        sums = {"critic_loss": loss.detach(), "critic_accuracy": right.float()}
        if self.spec.loss != "hinge":
            # One rank's part of a sum in which log 4 appears once.
            sums["equilibrium_gap"] = math.log(4) * len(real) / step.batch - loss.detach()
        return Loss(loss, sums)

    def _generator_loss(self, step: Step) -> Loss:
        asked = self.generator.asked(step.labels)
        fake = self.critic(self.generator(step.normal("latents", self.generator.latent), asked), asked)
        match self.spec.loss:
            case "zero-sum":
                each = -F.softplus(fake)
            case "non-saturating":
                each = F.softplus(-fake)
            case "hinge":
                each = -fake
        loss = each.sum() / step.batch
        sums = {"generator_loss": loss.detach()}
        if self.spec.orthogonal:
            # The penalty depends only on the weights: each part of the batch adds its fraction.
            overlaps = overlap(self.generator) * len(fake) / step.batch
            loss = loss + self.spec.orthogonal * overlaps
            sums |= {"overlap": overlaps.detach()}
        return Loss(loss, sums)


def samples(generator: Generator, step: Step, stream: str) -> Images:
    """Samples for the phase of the critic, without gradient for the generator."""
    with torch.no_grad():
        return generator(step.normal(stream, generator.latent), generator.asked(step.labels))


def scores(critic: Critic, real: Images, fake: Images, asked: Conditions | None = None) -> tuple[Scores, Scores]:
    """Scores of real images and of samples of the same classes, in one forward pass of the critic."""
    classes = None if asked is None else torch.cat([asked, asked])
    both = critic(torch.cat([real.to(fake.dtype), fake]), classes).float()
    return both[: len(real)], both[len(real) :]
