"""One iteration of Sinkhorn's algorithm, in one pass over the rows of the Gibbs kernel.

A textbook iteration reads the kernel twice: for ``K v``, then for ``Kᵀ u``. This implementation processes blocks of
rows that stay in cache: the row sums of a block give its new source potentials, and these give its part of the column
sums, before the next block is processed. A kernel in memory is read once per iteration; otherwise it is computed once
per iteration.

Exponents and logarithms are in base 2: torch's ``exp`` is about forty times slower if results underflow, as most
entries of a kernel with small epsilon do; ``exp2`` is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pipelines.transport.solvers.rows import CostRows

LOG2E = math.log2(math.e)

CPU_BLOCK = 2**21
"""Kernel entries per block on a CPU: 8 MiB, which fits into the last-level cache."""

GPU_BLOCK = 2**26
"""Kernel entries per block on a GPU, where a kernel launch costs as much as a million entries."""

SMALLEST, LARGEST = 2.0**-100, 2.0**100
"""Range in which sums are used without correction; the range of float32 is 2^±126."""

MAX_SHIFT = 40.0
"""Maximum change of the potentials absorbed in a kernel, as a power of two, before the kernel is computed again."""


@dataclass(frozen=True)
class IterationResult:
    """Result of one pass.

    Attributes:
        f: source potentials, (n,) float64.
        rows: mass of each row under them, in units of its weight, (n,) float64.
        columns: mass of each column in units of its weight, (m,) float64, summed over the rows of this kernel.
    """

    f: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


class Kernel:
    """The kernel ``exp((f_i + g_j − C_ij) / epsilon)``, in memory or computed block by block.

    Args:
        rows: rows of the cost matrix.
        a: weights of these rows, (n,) float64.
        b: weights of the columns, (m,) float64.
        keep: whether the kernel stays in memory between iterations.
    """

    def __init__(self, rows: CostRows, a: torch.Tensor, b: torch.Tensor, *, keep: bool) -> None:
        self.costs = rows
        self.a, self.b = a, b
        n, m = rows.shape
        entries = CPU_BLOCK if rows.device.type == "cpu" else GPU_BLOCK
        self._height = min(n, max(1, entries // m))
        self._kernel = torch.empty(n if keep else self._height, m, device=rows.device)
        self._keep = keep
        self._scratch: torch.Tensor | None = None
        self._base: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def iterate(
        self, f: torch.Tensor, g: torch.Tensor, epsilon: float, proximity: float | None = 1.0
    ) -> IterationResult:
        """Compute new source potentials and the masses of rows and columns.

        Args:
            f: source potentials, (n,) float64; if a row is outside float32's range, its c-transform is used instead.
            g: target potentials, (m,) float64.
            epsilon: entropic regularisation, > 0.
            proximity: ``rho / (rho + epsilon)`` of an unbalanced problem (Chizat et al. 2018); 1 meets the row
                marginal; None leaves ``f`` unchanged.
        """
        found = self._pass(f, g, epsilon, proximity)
        lost = ~((found.rows > SMALLEST) & (found.rows < LARGEST))
        if bool(lost.any()):
            f = torch.where(lost, self.transform(g), f)
            self._base = None
            found = self._pass(f, g, epsilon, proximity)
        found = replace(found, columns=self.gather(found.columns, "sum"))
        if proximity is None:
            return found
        # Once for all rows: each logarithm uses all threads, even for a short vector.
        new_f = proximity * (f - found.rows.log2() * (epsilon / LOG2E))
        return IterationResult(new_f, found.rows * ((new_f - f) * (LOG2E / epsilon)).exp2(), found.columns)

    def _pass(self, f: torch.Tensor, g: torch.Tensor, epsilon: float, proximity: float | None) -> IterationResult:
        """Compute the masses of the rows before the step of ``f``, and of the columns after it."""
        fresh = not self._near(f, g, epsilon)
        if fresh:
            self._base = (f, g, epsilon)
        assert self._base is not None
        base_f, base_g, _ = self._base
        scale = LOG2E / epsilon
        shift = ((g - base_g) * scale).exp2()
        right = (self.b * shift).float()
        u = ((f - base_f) * scale).exp2()
        left = self.a * u
        if proximity is not None and proximity < 1:
            left = left * ((proximity - 1) * f * scale).exp2()
        rows = torch.empty_like(f)
        columns = torch.zeros(len(g), device=g.device)
        for start, stop in self._blocks():
            inside = slice(start, stop)
            block = self._kernel[inside] if self._keep else self._kernel[: stop - start]
            if fresh:
                self._fill(block, start, stop)
            sums = torch.mv(block, right).double().mul_(u[inside])
            rows[inside] = sums
            weights = left[inside] if proximity is None else left[inside] / sums.pow_(proximity)
            columns.addmv_(block.T, weights.float())
        if not self._keep:
            self._base = None
        return IterationResult(f, rows, columns.double() * shift)

    def transform(self, g: torch.Tensor) -> torch.Tensor:
        """Compute the c-transform ``min_j C_ij − g_j``, (n,) float64."""
        # Targets without weight are ignored.
        right = torch.where(self.b > 0, g, -math.inf)
        f = torch.empty_like(self.a)
        for start, stop in self._blocks():
            f[start:stop] = -self._less_cost(start, stop, torch.zeros_like(f[start:stop]), right).amax(1)
        return f

    def column_transform(self, f: torch.Tensor) -> torch.Tensor:
        """Compute the c-transform ``min_i C_ij − f_i`` over all rows, (m,) float64."""
        most = torch.full_like(self.b, -math.inf)
        right = torch.zeros_like(self.b)
        for start, stop in self._blocks():
            torch.maximum(most, self._less_cost(start, stop, f[start:stop], right).amax(0).double(), out=most)
        return self.gather(-most, "min")

    def total(self, over_rows: torch.Tensor) -> float:
        """Sum (n,) numbers over all rows."""
        return float(self.gather(over_rows.sum()[None], "sum"))

    def gather(self, parts: torch.Tensor, by: Literal["sum", "min"]) -> torch.Tensor:
        """Reduce partial results to all rows; the identity here, because this kernel has all rows."""
        return parts

    def _near(self, f: torch.Tensor, g: torch.Tensor, epsilon: float) -> bool:
        if self._base is None or self._base[2] != epsilon:
            return False
        moved = max(float((f - self._base[0]).abs().max()), float((g - self._base[1]).abs().max()))
        return moved * LOG2E / epsilon < MAX_SHIFT

    def _blocks(self) -> list[tuple[int, int]]:
        n = self.costs.shape[0]
        return [(start, min(start + self._height, n)) for start in range(0, n, self._height)]

    def _fill(self, block: torch.Tensor, start: int, stop: int) -> None:
        assert self._base is not None
        f, g, epsilon = self._base
        scale = LOG2E / epsilon
        self.costs.exponents(start, stop, f[start:stop] * scale, g * scale, scale, block).exp2_()

    def _less_cost(self, start: int, stop: int, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Compute ``left_i + right_j − C_ij`` in a buffer that the next block reuses.

        Separate buffers would fragment the heap, because small results that are kept are allocated between them.
        """
        if self._scratch is None:
            m = self.costs.shape[1]
            self._scratch = torch.empty(self._height, m, device=left.device) if self._keep else self._kernel
        return self.costs.exponents(start, stop, left, right, 1.0, self._scratch[: stop - start])
