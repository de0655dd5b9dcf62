"""Blocks of rows of entropic plans, computed from their potentials."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pipelines.transport.problem import TransportProblem
from pipelines.transport.true_cost import BLOCK, TrueCost

NEGLIGIBLE = 1e-9
"""Fraction of a row's mass that may be left out of its sparse form, in entries of less than that over m each."""


class GibbsRows:
    """Rows of ``P_ij = a_i b_j exp((f_i + g_j − C_ij) / epsilon)`` in float64, in memory O((n + m) d).

    The certificate of the plan is computed from these numbers.

    Args:
        problem: points or cost matrix, weights and epsilon > 0.
        f: potentials of the sources, (n,) float64.
        g: potentials of the targets, (m,) float64.
        direct: whether to compute costs from differences; see :class:`TrueCost`.
    """

    def __init__(self, problem: TransportProblem, f: np.ndarray, g: np.ndarray, *, direct: bool = False) -> None:
        self.shape = problem.shape
        self._epsilon = problem.epsilon
        # Points without weight are left out, as they were when the plan was certified: costs are then the same numbers.
        inner, self._sources, targets = problem.with_weight()
        self._costs = TrueCost(inner, direct=direct)
        sides = (f[self._sources], g[targets], inner.source_weights(), inner.target_weights())
        self._f, self._g, self._a, self._b = (torch.as_tensor(side, device=self._costs.device) for side in sides)
        self._targets = torch.as_tensor(targets, device=self._costs.device)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start … stop − 1`` of the plan, (stop − start, m) float64."""
        stop = min(stop, self.shape[0])
        first, last = np.searchsorted(self._sources, (start, stop))
        inside = slice(int(first), int(last))
        exponents = self._g - self._costs.block(inside.start, inside.stop)
        exponents += self._f[inside, None]
        plan = (exponents / self._epsilon).exp_() * self._b * self._a[inside, None]
        if plan.shape == (stop - start, self.shape[1]):
            return plan
        places = torch.as_tensor(self._sources[inside] - start, device=plan.device)
        whole = plan.new_zeros(stop - start, self.shape[1])
        whole[places[:, None], self._targets] = plan
        return whole

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield blocks of rows, each with the index of its first row."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        height = max(1, BLOCK // self.shape[1])
        for first in range(start, stop, height):
            yield first, self.rows(first, min(first + height, stop))

    def entries(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries of some rows that carry mass: rows counted from ``start``, columns, mass.

        At most :data:`NEGLIGIBLE` of the mass of a row is omitted and spread over its other entries.
        """
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for first, block in self.blocks(start, stop):
            whole = block.sum(1, keepdim=True)
            kept = block > whole * (NEGLIGIBLE / block.shape[1])
            block = torch.where(kept, block, 0.0)
            block *= torch.where(whole > 0, whole / block.sum(1, keepdim=True), 0.0)
            rows, columns = kept.nonzero(as_tuple=True)
            found.append(tuple(part.cpu().numpy() for part in (rows + (first - start), columns, block[kept])))  # type: ignore[arg-type]
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
        rows_, columns_, mass = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return rows_, columns_, mass

    def barycentric(self, values: torch.Tensor) -> torch.Tensor:
        """Average values of the targets for each source point, weighted by the plan: (m, ...) → (n, ...).

        With the target points as values, this is the barycentric projection (Peyré & Cuturi 2019, remark 4.11).
        """
        flat = values.reshape(len(values), -1).double().to(self._costs.device)
        means = [(block @ flat) / block.sum(1, keepdim=True) for _, block in self.blocks()]
        return torch.cat(means).to(values.dtype).reshape(-1, *values.shape[1:])
