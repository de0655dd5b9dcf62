"""Averages the metrics of all steps and ranks between two log points."""

from __future__ import annotations

import math
import time

import torch

from pipelines.distributed import reduce_over_ranks
from pipelines.errors import DivergedError
from pipelines.objectives.phase import Loss


class Meters:
    """Accumulates the sums and maxima of losses on the device until :meth:`point` is called."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._maxima: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images = 0
        self._started = time.perf_counter()

    def add(self, *parts: Loss) -> None:
        """Add the metrics of one phase of one step, one loss per part of the batch."""
        for name in {name for loss in parts for name in loss.sums}:
            self._counts[name] = self._counts.get(name, 0) + 1
        for loss in parts:
            for name, value in loss.sums.items():
                value = torch.as_tensor(value, dtype=torch.float32, device=self._device)
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            for name, value in loss.maxima.items():
                value = torch.as_tensor(value, dtype=torch.float32, device=self._device)
                # A maximum over steps would lose −∞, and gloo's maximum over ranks would lose NaN.
                value = torch.where(value.isfinite(), value, torch.inf)
                self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)

    def count(self, images: int) -> None:
        """Count images, for the throughput."""
        self._images += images

    def point(self) -> dict[str, float]:
        """Metrics since the last call, over all ranks. Collective; returns the same on every rank.

        Raises:
            DivergedError: one of them is not finite.
        """
        names, maxima = sorted(self._sums), sorted(self._maxima)
        point: dict[str, float] = {}
        if names:
            sums = reduce_over_ranks(torch.stack([self._sums[name] / self._counts[name] for name in names]), "sum")
            point |= dict(zip(names, sums.tolist(), strict=True))
        if maxima:
            highest = reduce_over_ranks(torch.stack([self._maxima[name] for name in maxima]), "max")
            point |= dict(zip(maxima, highest.tolist(), strict=True))
        for name, value in point.items():
            if not math.isfinite(value):
                raise DivergedError(f"{name} is {value}", hint="lower optimizer.learning_rate")
        point["images_per_second"] = self._images / max(time.perf_counter() - self._started, 1e-9)
        self._clear()
        return point
