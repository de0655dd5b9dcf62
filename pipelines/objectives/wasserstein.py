"""Wasserstein GANs: the critic is a dual potential of the Euclidean cost, Monge's original cost."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.models.critics import Critic
from pipelines.models.network import Generator
from pipelines.objectives.gan import Conditions, Images, samples, scores
from pipelines.objectives.phase import Loss, Phase, Step
from pipelines.spec import WassersteinSpec


class Wasserstein:
    """``max_c E c(x) − E c(g(y))`` over 1-Lipschitz critics is the transport distance for the cost ‖x − y‖.

    This is Kantorovich–Rubinstein duality (Arjovsky, Chintala & Bottou 2017, eq. 2). The generator minimises the
    critic's estimate of the distance. The constraint keeps the critic Lipschitz:

    - ``clip``: its weights are clipped to [−clip, clip] after each update (ibid., algorithm 1); the Lipschitz constant
      is unknown, so the estimate is a multiple of the distance;
    - ``gradient-penalty``: ``penalty · E (‖∇c(x̂)‖ − 1)²`` between real images and samples (Gulrajani et al. 2017,
      eq. 3); the estimate is comparable with the exact distance of an evaluation;
    - ``none``: the critic's layers are divided by their spectral norms (Miyato et al. 2018).

    A conditional generator samples the classes of the batch's images, and the critic gets the same classes.

    Args:
        spec: constraint and number of critic updates.
        generator: generator to train.
        critic: critic with one output.
    """

    served = "generator"

    def __init__(self, spec: WassersteinSpec, generator: Generator, critic: Critic) -> None:
        self.spec = spec
        self.generator = generator
        self.critic = critic
        self.networks = {"generator": generator, "critic": critic}
        project = self._clip if spec.constraint == "clip" else None
        self.phases = [
            Phase("critic", critic, self._critic_loss, optimizer=spec.critic.optimizer, project=project),
            Phase("generator", generator, self._generator_loss, every=spec.critic_steps),
        ]

    def _critic_loss(self, step: Step) -> Loss:
        asked = self.generator.asked(step.labels)
        fakes = samples(self.generator, step, "critic's latents")
        real, fake = scores(self.critic, step.images, fakes, asked)
        estimate = (real - fake).sum() / step.batch
        loss, sums = -estimate, {"critic_estimate": estimate.detach()}
        if self.spec.constraint == "gradient-penalty":
            slopes = self._slopes(interpolates(step, fakes), asked)
            excess = (slopes - 1).square().sum() / step.batch
            loss = loss + self.spec.penalty * excess
            sums |= {"critic_slope": slopes.detach().sum() / step.batch}
        return Loss(loss, sums | {"critic_loss": loss.detach()})

    def _generator_loss(self, step: Step) -> Loss:
        asked = self.generator.asked(step.labels)
        fake = self.critic(self.generator(step.normal("latents", self.generator.latent), asked), asked).float()
        loss = -fake.sum() / step.batch
        return Loss(loss, {"generator_loss": loss.detach()})

    def _slopes(self, images: Images, asked: Conditions | None) -> Float[Tensor, " k"]:
        images = images.requires_grad_()
        (slopes,) = torch.autograd.grad(self.critic(images, asked).float().sum(), images, create_graph=True)
        # The square root has no gradient at 0.
        return slopes.flatten(1).square().sum(1).clamp_min(1e-12).sqrt()

    @torch.no_grad()
    def _clip(self) -> None:
        for weights in self.critic.parameters():
            weights.clamp_(-self.spec.clip, self.spec.clip)


def interpolates(step: Step, fakes: Images) -> Images:
    """Random points on the segments between real images and samples, (k, c, h, w)."""
    return torch.lerp(
        step.images.to(fakes.dtype), fakes, step.uniform("interpolation").to(fakes.dtype)[:, None, None, None]
    )
