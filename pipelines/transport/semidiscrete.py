"""Semidiscrete transport from a distribution that can be sampled to a data set."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport.plan import Certificate
from pipelines.transport.precision import in_full_precision
from pipelines.transport.problem import TransportProblem

BLOCK = 2**22
"""Number of costs held in memory at once."""

Sampler = Callable[[int, int], torch.Tensor]
"""``(count, draw) -> (count, d)`` samples of the source, a function of the number of the draw."""


@dataclass(frozen=True, eq=False)
class SemidiscretePlan:
    """A map from any point of the source distribution to a data point: ``argmin_j C(x, y_j) − g_j``.

    Attributes:
        y: data points, (m, d), in the precision of the data.
        g: potentials of the data points, (m,) float64.
        semidual: estimate of the semidual at ``g``, a lower bound of the cost of transport to equal weights.
        certificate: by K fresh samples, and so up to their noise. The map is optimal for the masses that data
            points receive from it: ``primal`` and ``dual`` are both its cost. ``marginal_error`` is the L1 distance
            between these masses and equal ones; the noise alone makes it ``√(2 m / (π K))`` for a perfect map.
    """

    y: torch.Tensor
    g: torch.Tensor
    semidual: float
    certificate: Certificate

    def assign(self, x: torch.Tensor) -> torch.Tensor:
        """Indices of the data points to which samples are mapped, (k,) int64, computed in blocks."""
        return _search(x, self.y, self.g, torch.float64)[0]


def solve(
    sampler: Sampler,
    y: torch.Tensor,
    *,
    steps: int = 2000,
    batch: int = 512,
    rate: float | None = None,
    tolerance: float = 0.2,
    check: int = 2**15,
) -> SemidiscretePlan:
    """The potential of a data set under the squared Euclidean cost, by averaged stochastic ascent of the semidual.

    Genevay et al. (2016), algorithm 2: each batch of samples adds to ``g`` what its data points should have received
    less what they did. The mean of the iterates is kept (Polyak & Juditsky 1992).

    Args:
        sampler: sampler of the source distribution.
        y: data points, (m, d), of equal weights.
        steps: number of steps of ascent.
        batch: number of samples per step.
        rate: initial step size, in units of the cost, which decreases as ``1 / √step``; by default fitted to the costs.
        tolerance: largest marginal error in excess of the sampling noise of the check.
        check: number of samples for the certificate; at least ten per data point are used.

    Raises:
        ProblemError: the data are not a valid problem.
        NotConvergedError: the marginal error of the map exceeds the tolerance.
    """
    started = time.perf_counter()
    if steps < 1 or batch < 1 or check < 1:
        raise ProblemError(f"steps {steps}, batch {batch}, check {check} received", hint="give at least 1 of each")
    problem = TransportProblem.between(sampler(batch, 0).to(y.device), y)
    y = torch.as_tensor(problem.y)
    m = len(y)
    if rate is None:
        # Costs of a point to the data differ by about as much as the data's own spread.
        rate = float((y.double() - y.double().mean(0)).square().sum(1).mean()) * m**0.5 / 4
    g = torch.zeros(m, dtype=torch.float64, device=y.device)
    mean = torch.zeros_like(g)
    for step in range(1, steps + 1):
        # A mistake here is one of many noisy steps; the certificate is of float64, as the map is.
        places, _ = _search(sampler(batch, step), y, g, torch.float32)
        received = torch.bincount(places, minlength=m).double() / batch
        g = g + rate / step**0.5 * (1 / m - received)
        # Only the second half is averaged: the first half depends on the initial value.
        if 2 * step > steps:
            mean += (g - mean) / (step - steps // 2)
    g = mean - mean.mean()
    samples = max(check, 10 * m)
    received, value, done = torch.zeros_like(g), 0.0, 0
    while done < samples:
        count = min(max(batch, BLOCK // m), samples - done)
        places, least = _search(sampler(count, steps + 1 + done), y, g, torch.float64)
        received += torch.bincount(places, minlength=m)
        value += float(least.sum())
        done += count
    masses = received / samples
    error = float((masses - 1 / m).abs().sum())
    noise = (2 * m / (torch.pi * samples)) ** 0.5
    cost = value / samples + float(g @ masses)
    certificate = Certificate(
        primal=cost,
        dual=cost,
        marginal_error=error,
        iterations=steps,
        converged=error - noise <= tolerance,
        solver="semidiscrete",
        milliseconds=(time.perf_counter() - started) * 1e3,
    )
    if not certificate.converged:
        raise NotConvergedError(
            f"the semidiscrete map has marginal error {error:.3g} after {steps} steps, its check's noise {noise:.3g}",
            hint="take more steps, or larger batches",
        )
    return SemidiscretePlan(y, g, value / samples + float(g.mean()), certificate)


@in_full_precision
def _search(x: torch.Tensor, y: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """For each sample ``argmin_j C_ij − g_j`` and the least itself, (k,) int64 and (k,) float64, found in ``dtype``."""
    # Centred in float64: far from the origin float32 would not hold what tells points apart.
    centre = y.double().mean(0)
    x, y = ((side.to(y.device).reshape(len(side), -1).double() - centre).to(dtype) for side in (x, y))
    level = (y * y).sum(1) - g.to(dtype)
    found = [torch.addmm(level, part, y.T, alpha=-2).min(1) for part in x.split(max(1, BLOCK // len(y)))]
    least = torch.cat([each.values for each in found]).double() + (x * x).sum(1).double()
    return torch.cat([each.indices for each in found]), least
