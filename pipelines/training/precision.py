"""The precision in which networks train."""

from __future__ import annotations

import torch

from pipelines.distributed import reduce_over_ranks
from pipelines.spec import TrainSpec


def training_precision(spec: TrainSpec, device: torch.device) -> torch.dtype:
    """``spec.precision`` if the devices of all ranks support it, else float32. Collective: every rank calls it.

    On processors without support (x86-64 before AVX-512), PyTorch emulates bfloat16, and a convolution takes ten times
    as long as in float32.

    Args:
        spec: the precision that was asked for.
        device: of this rank.
    """
    if spec.precision == "float32":
        return torch.float32
    everywhere = reduce_over_ranks(torch.tensor(float(supports_bfloat16(device)), device=device), "min")
    return torch.bfloat16 if everywhere else torch.float32


def supports_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch has fast bfloat16 convolutions and matrix products for a device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
