"""Optimizers, and learning rates as a pure function of images seen."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipelines.spec import OptimizerSpec

RISE = 0.2
"""Fraction of a run over which the rate of one cycle rises (Smith & Topin 2019)."""

SLOTS: dict[type[torch.optim.Optimizer], frozenset[str]] = {
    torch.optim.AdamW: frozenset({"step", "exp_avg", "exp_avg_sq"}),
    torch.optim.SGD: frozenset({"momentum_buffer"}),
}
"""What each kind keeps of a weight from one step to the next."""


def build_optimizer(spec: OptimizerSpec, module: nn.Module) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015; with decoupled decay, Loshchilov & Hutter 2019) or SGD with momentum."""
    if spec.kind == "adam":
        return torch.optim.AdamW(
            module.parameters(),
            lr=spec.learning_rate,
            betas=(spec.momentum, spec.second_moment),
            weight_decay=spec.weight_decay,
        )
    return torch.optim.SGD(
        module.parameters(),
        lr=spec.learning_rate,
        momentum=spec.momentum,
        nesterov=spec.nesterov,
        weight_decay=spec.weight_decay,
    )


def learning_rate(spec: OptimizerSpec, done: float) -> float:
    """The rate after a fraction of the run, 0 to 1; there is no scheduler whose state could be lost."""
    match spec.schedule:
        case "constant":
            return spec.learning_rate
        case "cosine":
            return spec.learning_rate * (1 + math.cos(math.pi * done)) / 2
        case "one-cycle":
            return spec.learning_rate * min(done / RISE, (1 - done) / (1 - RISE))
