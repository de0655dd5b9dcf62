"""One sweep of Sinkhorn's algorithm, in one pass over the rows of the Gibbs kernel.

A textbook iteration reads the kernel twice: for ``K v``, then for ``Kᵀ u``. Here rows are taken in blocks that stay in
cache: a block's row sums give its new source potentials, and with them its part of the column sums, before the next
block is looked at. A kernel in memory is read once a sweep; one that is computed on the fly is computed once a sweep.

Exponents are taken in base 2: torch's ``exp`` falls to a fortieth of its speed where results underflow, as most
entries of a kernel of small epsilon do; its ``exp2`` does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipelines.transport.cost import CostRows

LOG2E = math.log2(math.e)

CPU_BLOCK = 2**20
"""Kernel entries in a block on a CPU: 4 MiB, within the cache next to it."""

GPU_BLOCK = 2**26
"""The same on a GPU, where a launch costs as much as a million entries."""

SMALLEST, LARGEST = 2.0**-100, 2.0**100
"""Sums between these are taken as they are: float32 ends at 2^±126."""

MAX_SHIFT = 40.0
"""Powers of two by which potentials may move away from those in a kernel before it is made anew."""


@dataclass(frozen=True)
class Sweep:
    """What one pass found.

    Attributes:
        f: new source potentials, (n,) float64.
        rows: mass of each row under ``(f, g)``, in units of its weight, (n,) float64.
        columns: the same of the columns, (m,) float64, over the rows held here.
    """

    f: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


@dataclass(frozen=True)
class Relaxation:
    """How far potentials go towards those that would meet their marginal.

    Attributes:
        omega: over-relaxation, in [1, 2); 1 meets the marginal.
        proximity: ``rho / (rho + epsilon)`` of an unbalanced problem; 1 for a balanced one.
    """

    omega: float = 1.0
    proximity: float = 1.0

    def step(self, potential: torch.Tensor, mass: torch.Tensor, epsilon: float) -> torch.Tensor:
        """The potential after a step, given the masses of its rows (or columns) in units of their weights."""
        target = self.proximity * (potential - epsilon * mass.log())
        return potential + self.omega * (target - potential)


class Kernel:
    """The kernel ``exp((f_i + g_j − C_ij) / epsilon)``, in memory or made block by block.

    Args:
        rows: the costs.
        a: weights of these rows, (n,) float64.
        b: weights of the columns, (m,) float64.
        keep: whether the kernel stays in memory from sweep to sweep.
    """

    def __init__(self, rows: CostRows, a: torch.Tensor, b: torch.Tensor, *, keep: bool) -> None:
        self.costs = rows
        self.a, self.b = a, b
        n, m = rows.shape
        entries = CPU_BLOCK if rows.device.type == "cpu" else GPU_BLOCK
        self._height = min(n, max(1, entries // m))
        self._kernel = torch.empty(n if keep else self._height, m, device=rows.device)
        self._keep = keep
        self._base: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def sweep(self, f: torch.Tensor, g: torch.Tensor, epsilon: float, relaxation: Relaxation) -> Sweep:
        """New source potentials, and the masses that they leave.

        Args:
            f: (n,) float64, near those that meet the marginals; rows that are far off start from their c-transform.
            g: (m,) float64.
            epsilon: > 0.
            relaxation: of the step.
        """
        fresh = not self._near(f, g, epsilon)
        if fresh:
            self._base = (f.clone(), g, epsilon)
        assert self._base is not None
        base_f, base_g, _ = self._base
        shift = ((g - base_g) / epsilon).exp()
        right = (self.b * shift).float()
        u = ((f - base_f) / epsilon).exp()
        rows = torch.empty_like(f)
        new_f = f.clone()
        columns = torch.zeros(len(g), device=g.device)
        for start, stop in self._blocks():
            inside = slice(start, stop)
            block = self._block(start, stop) if self._keep else self._kernel[: stop - start]
            if fresh:
                self._fill(block, start, stop)
            sums = (block @ right).double() * u[inside]
            if not bool(((sums > SMALLEST) & (sums < LARGEST)).all()):
                f[inside] = new_f[inside] = base_f[inside] = self._transform(start, stop, base_g)
                u[inside] = 1
                self._fill(block, start, stop)
                sums = (block @ right).double()
            new_f[inside] = relaxation.step(f[inside], sums, epsilon)
            moved = ((new_f[inside] - f[inside]) / epsilon).exp()
            rows[inside] = sums * moved
            columns.addmv_(block.T, (self.a[inside] * u[inside] * moved).float())
        if not self._keep:
            self._base = None
        return Sweep(new_f, rows, columns.double() * shift)

    def transform(self, g: torch.Tensor) -> torch.Tensor:
        """The c-transform ``min_j C_ij − g_j``, (n,) float64."""
        return torch.cat([self._transform(start, stop, g) for start, stop in self._blocks()])

    def column_transform(self, f: torch.Tensor) -> torch.Tensor:
        """The c-transform ``min_i C_ij − f_i`` over the rows held here, (m,) float64."""
        least = torch.full_like(self.b, math.inf)
        for start, stop in self._blocks():
            costs = self.costs.costs(start, stop)
            least = torch.minimum(least, (costs - f[start:stop, None].float()).amin(0).double())
        return least

    def bilinear(self, p: torch.Tensor, q: torch.Tensor) -> float:
        """``pᵀ C q``."""
        total = 0.0
        for start, stop in self._blocks():
            total += float(p[start:stop] @ (self.costs.costs(start, stop) @ q.float()).double())
        return total

    def _near(self, f: torch.Tensor, g: torch.Tensor, epsilon: float) -> bool:
        if self._base is None or self._base[2] != epsilon:
            return False
        moved = max(float((f - self._base[0]).abs().max()), float((g - self._base[1]).abs().max()))
        return moved * LOG2E / epsilon < MAX_SHIFT

    def _blocks(self) -> list[tuple[int, int]]:
        n = self.costs.shape[0]
        return [(start, min(start + self._height, n)) for start in range(0, n, self._height)]

    def _block(self, start: int, stop: int) -> torch.Tensor:
        return self._kernel[start:stop]

    def _fill(self, block: torch.Tensor, start: int, stop: int) -> None:
        assert self._base is not None
        f, g, epsilon = self._base
        scale = LOG2E / epsilon
        left, right = (f[start:stop] * scale).float(), (g * scale).float()
        self.costs.exponents(start, stop, left, right, scale, block).exp2_()

    def _transform(self, start: int, stop: int, g: torch.Tensor) -> torch.Tensor:
        # A target without weight takes no part.
        right = torch.where(self.b > 0, g, -math.inf)
        return (self.costs.costs(start, stop) - right.float()).amin(1).double()
