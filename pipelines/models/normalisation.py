"""Normalisation over the images of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.distributed import sum_with_gradient, world_size


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation (Ioffe & Szegedy 2015) with the mean and variance of the *global* batch.

    The result does not depend on the number of ranks. Ranks exchange two numbers per channel in the forward and the
    backward pass. ``torch.nn.SyncBatchNorm`` supports only GPUs.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise this rank's feature maps, (b, channels, h, w), by the moments over all ranks' images."""
        if not self.training or world_size() == 1:
            return super().forward(maps)
        wide = maps.float() if maps.dtype == torch.bfloat16 else maps
        count = float(sum_with_gradient(wide.new_tensor([wide[:, 0].numel()])))
        mean = sum_with_gradient(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = sum_with_gradient(centred.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            self._track(mean, variance * count / (count - 1))
        normal = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            normal = normal * self.weight[:, None, None] + self.bias[:, None, None]
        return normal.to(maps.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running moments; the variance is unbiased, as in a single process."""
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.0)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum or 0.0)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
