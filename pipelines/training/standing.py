"""Statistics of batch normalisation that belong to averaged weights."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.data.partition import rank_slice
from pipelines.distributed import rank, world_size
from pipelines.models.network import Generator
from pipelines.models.normalisation import GlobalBatchNorm
from pipelines.randomness import step_generator

PASSES = 16
"""Batches of samples over which statistics are averaged."""


@torch.no_grad()
def renew_statistics(network: nn.Module, batch: int, seed: int, device: torch.device) -> None:
    """Measure a generator's means and variances anew, on samples by its weights as they are.

    The moving statistics that training leaves are of the weights of the last steps, not of their average. These are the
    standing statistics of Brock, Donahue & Simonyan (2019, appendix C.3). Every rank calls it; ranks share each batch.
    Networks of other kinds, and without batch normalisation, stay as they are.

    Args:
        network: changed in place, and left in evaluation mode.
        batch: samples in a pass.
        seed: of the latent vectors, which are the same each time.
        device: where the network is.
    """
    norms = [module for module in network.modules() if isinstance(module, GlobalBatchNorm)]
    if not isinstance(network, Generator) or not norms:
        return
    share = rank_slice(batch, rank(), world_size())
    conditions = network.in_turn(batch, device)
    kept = [norm.momentum for norm in norms]
    # All else as when it is judged: spectral norms would go on iterating.
    network.eval()
    for norm in norms:
        norm.train()
    for number in range(PASSES):
        for norm in norms:
            norm.momentum = 1 / (number + 1)  # all passes weigh the same; the first replaces what was there
        latents = torch.randn(batch, network.latent, generator=step_generator(seed, number, "standing statistics"))
        network(latents[share].to(device), None if conditions is None else conditions[share])
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    network.eval()
