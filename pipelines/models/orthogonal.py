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
        layer: layer, modified in place.
        spectral: whether to parametrise the weights by division by their spectral norm (Miyato et al. 2018).
    """
    # Decomposed in float64: in float32 the result depends on the processor.
    weight = nn.init.orthogonal_(torch.empty_like(layer.weight, dtype=torch.float64))
    with torch.no_grad():
        layer.weight.copy_(weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return normalised(layer, spectral)


def normalised(layer: Layer, spectral: bool) -> Layer:
    """Apply spectral normalisation to a layer if ``spectral`` is true, and return the layer."""
    if spectral:
        spectral_norm(layer)  # in place
    return layer


def overlap(network: nn.Module) -> Float[Tensor, ""]:
    """``Σ ‖W Wᵀ ⊙ (1 − I)‖²`` over the layers: squared inner products of different rows of their weights.

    The relaxed orthogonal penalty (Brock, Donahue & Simonyan 2019, eq. 3); rows are filters. For layers with spectral
    normalisation it is computed from the weights before the division. It makes generators amenable to truncated latent
    vectors (ibid., section 3.1).
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
