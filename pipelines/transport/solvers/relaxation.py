"""The over-relaxation factor, fitted to the rate of convergence while the algorithm runs."""

from __future__ import annotations

import math

WINDOW = 6
"""Sweeps between two estimates of the rate."""

WARM_UP = 4
"""Plain sweeps before the first one."""

LARGEST = 1.95


class Tuner:
    """Chooses the factor of each sweep.

    Near the solution Sinkhorn's algorithm is a linear Gauss–Seidel iteration of two blocks. If it converges at rate
    λ, over-relaxation by ``ω = 2 / (1 + √(1 − λ))`` does at ω − 1, the square root of the number of sweeps (Young
    1954; for Sinkhorn Thibault et al. 2021, Lehmann et al. 2022). λ is read off the errors: off those of a relaxed
    iteration at rate μ > ω − 1 by Young's ``(μ + ω − 1)² = μ ω² λ``. An error that grows ends over-relaxation for a
    while: far from the solution nothing promises that it converges.

    Args:
        over: whether to relax at all.
    """

    def __init__(self, *, over: bool) -> None:
        self.omega = 1.0
        self._over = over
        self._largest = LARGEST
        self._errors: list[float] = []
        self._plain = WARM_UP
        self._best = math.inf

    def observe(self, error: float, *, finish: bool = False) -> None:
        """Take note of a sweep's error.

        Args:
            error: of both marginals.
            finish: whether the next sweep is to meet the row marginal exactly.
        """
        if not self._over:
            return
        if finish:
            self._set(1.0, plain=1)
            return
        self._errors.append(error)
        if error > 4 * self._best and self.omega > 1:
            self._largest = 1 + 0.8 * (self._largest - 1)
            self._set(1.0, plain=WARM_UP)
            return
        self._best = min(self._best, error)
        wanted = self._plain if self.omega == 1 else WINDOW
        if len(self._errors) <= wanted:
            return
        span = min(wanted, 3 if self.omega == 1 else WINDOW)
        rate = (error / self._errors[-1 - span]) ** (1 / span) if self._errors[-1 - span] > 0 else 0.0
        if self.omega == 1:
            self._set(self._optimal(rate), plain=WARM_UP)
        elif rate > self.omega - 1 and rate < 1:
            # Slower than the optimal factor would be: the factor is too small.
            self._set(max(self.omega, self._optimal((rate + self.omega - 1) ** 2 / (rate * self.omega**2))))
        else:
            self._errors = [error]

    def _optimal(self, rate: float) -> float:
        return min(2 / (1 + math.sqrt(max(0.0, 1 - min(rate, 1.0)))), self._largest)

    def _set(self, omega: float, plain: int = WARM_UP) -> None:
        self.omega = omega
        self._plain = plain
        self._errors = []
