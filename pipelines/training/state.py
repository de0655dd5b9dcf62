"""The state of a run between two steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from pipelines.errors import DivergedError
from pipelines.objectives.phase import Objective
from pipelines.spec import JobSpec
from pipelines.training.optimizer import build_optimizer
from pipelines.training.precision import training_precision


@dataclass(eq=False)
class TrainState:
    """Everything that a checkpoint has to hold for an exact resume.

    Randomness, learning rates and the position in the data are functions of the step (see ``pipelines.randomness``), so
    the networks, their average and the optimizers are enough.

    Attributes:
        networks: all networks of the objective, by name.
        optimizers: one per phase, by the name of the phase.
        average: exponential moving average of the served network; None without ``train.ema_half_life``.
        served: name of the network that is evaluated, registered and served.
        fingerprint: of the spec.
        precision: of matrix products and convolutions; it depends on the devices and is not part of a checkpoint.
        step: number of finished steps.
        images: number of images seen, over all ranks.
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    average: nn.Module | None
    served: str
    fingerprint: str
    precision: torch.dtype
    step: int = 0
    images: int = field(default=0)

    @classmethod
    def start(cls, spec: JobSpec, objective: Objective) -> TrainState:
        """The state before the first step. Collective: every rank calls it."""
        networks = dict(objective.networks)
        average = None
        if spec.train.ema_half_life is not None:
            average = copy.deepcopy(networks[objective.served]).requires_grad_(False).eval()
        for network in networks.values():
            if spec.train.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if spec.train.compile:
                network.compile()
        return cls(
            networks=networks,
            optimizers={
                phase.name: build_optimizer(phase.optimizer or spec.optimizer, phase.module)
                for phase in objective.phases
            },
            average=average,
            served=objective.served,
            fingerprint=spec.fingerprint(),
            precision=training_precision(spec.train, next(networks[objective.served].parameters()).device),
        )

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated, registered and served: the average if there is one."""
        return self.networks[self.served] if self.average is None else self.average

    def require_finite(self) -> None:
        """Check all weights. All ranks hold the same weights, so all of them raise or none.

        Raises:
            DivergedError: a weight is not finite.
        """
        for network, module in self.networks.items():
            for name, weights in module.named_parameters():
                if not bool(weights.isfinite().all()):
                    raise DivergedError(
                        f"after {self.images} images, weights {name} of the {network} are no longer finite",
                        hint="lower optimizer.learning_rate",
                    )

    @torch.no_grad()
    def advance(self, batch: int, half_life: int | None) -> None:
        """Count a step of ``batch`` images, and update the average with this half-life (in images)."""
        self.step += 1
        self.images += batch
        if self.average is not None and half_life is not None:
            keep = 0.5 ** (batch / half_life)
            followed = self.networks[self.served]
            torch._foreach_lerp_(list(self.average.parameters()), list(followed.parameters()), 1 - keep)
            for mean, current in zip(self.average.buffers(), followed.buffers(), strict=True):
                mean.copy_(current)
