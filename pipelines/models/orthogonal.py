"""Orthogonal initialisation and regularisation of weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def bounded(layer: Layer, spectral: bool = True) -> Layer:
    """Initialise a layer with orthogonal weights (Saxe et al. 2014) and zero bias.

    Args:
        layer: is changed.
        spectral: whether its weights are divided by their spectral norm from then on (Miyato et al. 2018).
    """
    # Decomposed in float64: in float32 the digits depend on the processor.
    weight = nn.init.orthogonal_(torch.empty_like(layer.weight, dtype=torch.float64))
    with torch.no_grad():
        layer.weight.copy_(weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return normalised(layer, spectral)


def normalised(layer: Layer, spectral: bool) -> Layer:
    """The layer, its weights divided by their spectral norm if asked for."""
    if spectral:
        spectral_norm(layer)  # in place
    return layer


def overlap(network: nn.Module) -> Float[Tensor, ""]:
    """``Σ ‖W Wᵀ ⊙ (1 − I)‖²`` over the layers: squared inner products of different rows of their weights.

    The relaxed orthogonal penalty (Brock, Donahue & Simonyan 2019, eq. 3); rows are the filters. For a layer with a
    spectral norm it is computed on the weights before the division. A generator trained with it tolerates truncated
    latent vectors (ibid., section 3.1).
    """
    total = torch.zeros((), device=next(network.parameters()).device)
    for layer in network.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        split = parametrize.is_parametrized(layer, "weight")
        weight = layer.get_parameter("parametrizations.weight.original") if split else layer.weight
        assert isinstance(weight, Tensor)
        rows = weight.flatten(1)
        inner = rows @ rows.T
        total = total + inner.square().sum() - inner.diagonal().square().sum()
    return total
