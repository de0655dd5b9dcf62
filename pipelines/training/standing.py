"""Standing statistics: batch-normalisation statistics for averaged weights."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.data.partition import rank_slice
from pipelines.distributed import rank, world_size
from pipelines.models.network import Generator
from pipelines.models.normalisation import GlobalBatchNorm
from pipelines.randomness import step_generator

PASSES = 16
"""Number of batches of samples that statistics are averaged over."""


@torch.no_grad()
def renew_statistics(network: nn.Module, batch: int, seed: int, device: torch.device) -> None:
    """Recompute the batch-normalisation statistics of a generator from samples by its current weights.

    The moving statistics of training belong to the weights of the last steps, not to their average. These are the
    standing statistics of Brock, Donahue & Simonyan (2019, appendix C.3). Collective: the ranks share each batch.
    Other networks, and generators without batch normalisation, are left unchanged.

    Args:
        network: changed in place, and left in evaluation mode.
        batch: number of samples in a pass.
        seed: of the latent vectors, which are the same in each call.
        device: where the network is.
    """
    norms = [module for module in network.modules() if isinstance(module, GlobalBatchNorm)]
    if not isinstance(network, Generator) or not norms:
        return
    share = rank_slice(batch, rank(), world_size())
    conditions = network.in_turn(batch, device)
    kept = [norm.momentum for norm in norms]
    # Everything else stays in evaluation mode: spectral norms would iterate in training mode.
    network.eval()
    for norm in norms:
        norm.train()
    for number in range(PASSES):
        for norm in norms:
            norm.momentum = 1 / (number + 1)  # equal weights for all passes; the first replaces the old statistics
        latents = torch.randn(batch, network.latent, generator=step_generator(seed, number, "standing statistics"))
        network(latents[share].to(device), None if conditions is None else conditions[share])
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    network.eval()
