"""Anderson acceleration of a fixed-point iteration, with restarts."""

from __future__ import annotations

import math
from collections import deque

import torch

MEMORY = 10
"""Number of earlier steps that are combined. More gave no gain on images; fewer lose the slow modes."""

RIDGE = 1e-10
"""Relative ridge of the least squares: steps become parallel as they converge."""

GROWTH = 2.0
"""Ratio of the error to its minimum so far at which the acceleration restarts."""


class Anderson:
    """Chooses the next point of ``g ← T(g)`` from the last steps ``T(g) − g``.

    Walker & Ni (2011), "Anderson acceleration for fixed-point iterations": combines the last points such that the step
    would be minimal if T were linear. Near its solution, Sinkhorn's algorithm is linear and self-adjoint in L²(b), so
    the combination acts like a Krylov method: modes that persist for hundreds of plain iterations vanish in a few. If
    the error grows instead, the plain iteration continues from the best point so far.

    Args:
        weights: weights of the inner product, (m,) float64.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self._weights = weights
        self._points: deque[torch.Tensor] = deque(maxlen=MEMORY + 1)
        self._steps: deque[torch.Tensor] = deque(maxlen=MEMORY + 1)
        self._least = math.inf
        self._best: torch.Tensor | None = None

    def next(self, g: torch.Tensor, step: torch.Tensor, error: float) -> torch.Tensor:
        """Return the next point to try.

        Args:
            g: current point, (m,) float64.
            step: ``T(g) − g``.
            error: error at ``g``.
        """
        if error > GROWTH * self._least and self._best is not None:
            self._points.clear()
            self._steps.clear()
            restart, self._best, self._least = self._best, None, math.inf
            return restart
        if error < self._least:
            self._least, self._best = error, g + step
        self._points.append(g)
        self._steps.append(step)
        if len(self._steps) < 2:
            return g + step
        steps = torch.stack(list(self._steps))
        differences = steps[1:] - steps[:-1]
        weighted = differences * self._weights
        normal = weighted @ differences.T
        # Not lstsq: its results differ from run to run.
        normal.diagonal().add_(RIDGE * normal.trace() + torch.finfo(normal.dtype).tiny)
        mix = torch.linalg.solve(normal, weighted @ step)
        moves = torch.stack(list(self._points)).diff(dim=0) + differences
        return g + step - mix @ moves
