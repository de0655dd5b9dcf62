"""Optimizers, and learning rates as a pure function of images seen."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipelines.spec import JobSpec, OptimizerSpec


def build_optimizer(spec: OptimizerSpec, module: nn.Module) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015; with decoupled decay, Loshchilov & Hutter 2019) or SGD with momentum."""
    if spec.kind == "adam":
        return torch.optim.AdamW(
            module.parameters(),
            lr=spec.learning_rate,
            betas=(spec.momentum, 0.999),
            weight_decay=spec.weight_decay,
        )
    return torch.optim.SGD(
        module.parameters(), lr=spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay
    )


def learning_rate(spec: JobSpec, images: int) -> float:
    """The rate after so many images; there is no scheduler whose state could be lost."""
    if spec.optimizer.schedule == "constant":
        return spec.optimizer.learning_rate
    done = min(1.0, images / spec.train.images)
    return spec.optimizer.learning_rate * (1 + math.cos(math.pi * done)) / 2
