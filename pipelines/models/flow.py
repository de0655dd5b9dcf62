"""Generator that integrates a velocity field from noise to images."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.models.network import Conditions, Generator, Images, Latents
from pipelines.shape import ImageShape

TIME_FEATURES = 64


class FlowUNet(Generator):
    """A U-Net for the velocity of a flow (Lipman et al. 2023), and the flow, integrated by Euler's method.

    The latent vector is the noise image. 2 × 2 blocks of pixels are folded into channels (Shi et al. 2016), so the
    highest resolution inside the network is half that of the image. The time sets a scale and a shift of the normalised
    feature maps of each block (Perez et al. 2018).

    Args:
        image: shape of the output; sides that are not multiples of 4 are padded internally.
        width: number of channels at the first resolution; the second one has twice as many.
        steps: number of Euler steps from noise to image, with one evaluation of the network each.
        conditions: number of classes of a conditional flow, whose embedding is added to that of the time; 0 for an
            unconditional flow.
    """

    def __init__(self, image: ImageShape, width: int, steps: int, conditions: int = 0) -> None:
        super().__init__(image, image.pixels, conditions)
        self.steps = steps
        folded = 4 * image.channels
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.condition = nn.Linear(conditions, 2 * width, bias=False) if conditions else None
        self.enter = nn.Conv2d(folded, width, 3, padding=1)
        self.fine = nn.ModuleList(_Block(width, width, 2 * width) for _ in range(2))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(_Block(2 * width, 2 * width, 2 * width) for _ in range(2))
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.joined = nn.ModuleList([_Block(2 * width, width, 2 * width), _Block(width, width, 2 * width)])
        # The last convolution is initialised to zero: the initial velocity is zero.
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), _silent(nn.Conv2d(width, folded, 3, padding=1)))
        self._pad = (0, -image.width % 4, 0, -image.height % 4)

    def velocity(self, points: Images, times: Float[Tensor, " b"], conditions: Conditions | None = None) -> Images:
        """Velocities of points at times in [0, 1]; conditions as in :meth:`Generator.forward`."""
        time = self.time(_time_features(times))
        if self.condition is not None:
            time = time + self.condition(conditions)
        maps = self.enter(F.pixel_unshuffle(F.pad(points, self._pad), 2))
        for block in self.fine:
            maps = block(maps, time)
        deep = self.down(maps)
        for block in self.coarse:
            deep = block(deep, time)
        maps = torch.cat([maps, self.up(F.interpolate(deep, scale_factor=2, mode="nearest"))], dim=1)
        for block in self.joined:
            maps = block(maps, time)
        return F.pixel_shuffle(self.leave(maps), 2)[..., : self.image.height, : self.image.width]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile :meth:`velocity`, which training calls (see :meth:`torch.nn.Module.compile`)."""
        self.velocity = torch.compile(self.velocity, *args, **kwargs)  # type: ignore[method-assign]

    def integrate(self, latents: Latents, steps: int, conditions: Conditions | None = None) -> Images:
        """Integrate the flow from noise to images by Euler steps; pixels are clamped to [−1, 1]."""
        points = latents.view(-1, *self.image.dims)
        for step in range(steps):
            times = torch.full((len(points),), step / steps, device=points.device)
            points = points + self.velocity(points, times, conditions) / steps
        return points.clamp(-1, 1)

    def forward(self, latents: Latents, conditions: Conditions | None = None) -> Images:
        """See :class:`Generator`."""
        return self.integrate(latents, self.steps, conditions)


class _Block(nn.Module):
    """Residual block of two convolutions (He et al. 2016), modulated by the time."""

    def __init__(self, channels_in: int, channels_out: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        )
        self.norm = nn.GroupNorm(8, channels_out, affine=False)
        self.by_time = nn.Linear(time, 2 * channels_out)
        self.second = _silent(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, maps: Float[Tensor, "b i h w"], time: Float[Tensor, "b t"]) -> Float[Tensor, "b o h w"]:
        scale, shift = self.by_time(F.silu(time))[..., None, None].chunk(2, dim=1)
        moved = self.norm(self.first(maps)) * (1 + scale) + shift
        return self.shortcut(maps) + self.second(F.silu(moved))


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _time_features(times: Float[Tensor, " b"]) -> Float[Tensor, "b features"]:
    """Sines and cosines of the times at frequencies from 1 to 1000, like positional encodings (Vaswani et al. 2017)."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(torch.linspace(0, math.log(1000), half, dtype=times.dtype, device=times.device))
    angles = times[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
