"""Entropic transport by Sinkhorn's algorithm, stabilised, accelerated and certified.

``min <P, C> + epsilon KL(P | a bᵀ)`` has the solution ``P_ij = a_i b_j exp((f_i + g_j − C_ij) / epsilon)`` (Peyré &
Cuturi 2019, prop. 4.3; the marginals as reference measure make the potentials independent of n). The potentials are
kept in float64 and absorbed into a float32 kernel, whose entries then stay near their masses (Schmitzer 2019).
Epsilon falls from the scale of the costs to its value (ibid.), and the iteration on the target potentials is
accelerated.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport.cost import MatrixRows, cost_matrix, cost_rows
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import bounds
from pipelines.transport.solvers.anderson import Anderson
from pipelines.transport.solvers.sweep import LOG2E, Kernel, Sweep

TOLERANCE = 1e-3
"""Marginal error at which a plan counts as converged: mass that is not where the marginals want it."""

MAX_SWEEPS = 10_000

DENSE_BYTES = 2**30
"""Memory for cost matrix and kernel up to which both are kept."""

SMALLEST_EPSILON = 2e-6
"""Least epsilon, as a fraction of the scale of the costs, whose kernel float32 costs still determine to some digits."""

FALL = 4.0
"""Ratio of two consecutive values of epsilon. Larger ones could take the kernel of the next under float32's range."""

SMALLEST_TOLERANCE = 1e-6
"""Least marginal error that sums in float32 can tell from none."""

COARSE = 0.1
"""Marginal error at which epsilon falls."""

SAMPLED_ROWS = 32


def choose(problem: TransportProblem) -> tuple[str, str]:
    """Whether the cost matrix and its kernel are small enough to be kept, and why."""
    n, m = problem.shape
    needed = 8 * n * m
    sizes = f"cost matrix and kernel take {needed / 2**20:.0f} MiB"
    if needed <= DENSE_BYTES:
        return "sinkhorn", f"epsilon > 0; {sizes}"
    return "sinkhorn-streaming", f"epsilon > 0; {sizes}, over the {DENSE_BYTES / 2**20:.0f} that are kept"


def solve(
    problem: TransportProblem,
    *,
    tolerance: float = TOLERANCE,
    max_sweeps: int = MAX_SWEEPS,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    streaming: bool | None = None,
) -> TransportPlan:
    """An entropic plan, held by its potentials.

    Runs where the points are: on a GPU if they are tensors there.

    Args:
        problem: epsilon > 0.
        tolerance: marginal error to reach, the L1 norm over both marginals; for an unbalanced problem, relative gap.
        max_sweeps: most passes over the kernel.
        start: potentials (f, g) of a similar problem, to start from without scaling epsilon.
        streaming: True computes the kernel block by block at each sweep, in memory O((n + m) d); False keeps it;
            None decides by its size.

    Returns:
        A plan whose certificate bounds the optimum on both sides: ``dual`` by the potentials, ``primal`` by the plan
        rounded to its marginals (Altschuler, Weed & Rigollet 2017). ``iterations`` counts sweeps.

    Raises:
        ProblemError: epsilon or tolerance too small for float32; potentials that do not fit.
        NotConvergedError: ``max_sweeps`` did not suffice.
    """
    started = time.perf_counter()
    if streaming is None:
        streaming = choose(problem)[0] == "sinkhorn-streaming"
    rows = cost_rows(problem) if streaming else MatrixRows(cost_matrix(problem))
    a, b = (
        torch.as_tensor(weights, device=rows.device) for weights in (problem.source_weights(), problem.target_weights())
    )
    kernel = Kernel(rows, a, b, keep=not streaming)
    solver = Iteration(kernel, problem.epsilon, problem.marginal_penalty, tolerance, max_sweeps)
    solver.solve(start)
    return solver.plan(problem, "sinkhorn-streaming" if streaming else "sinkhorn", started)


def scale_of(kernel: Kernel) -> float:
    """The size of the costs above their least, from some rows: where epsilon starts."""
    n = kernel.costs.shape[0]
    sampled = torch.cat([kernel.costs.costs(i, i + 1) for i in range(0, n, max(1, n // SAMPLED_ROWS))]).double()
    least = kernel.gather(sampled.amin()[None], "min")
    sums = torch.stack([(sampled - least).square().sum(), torch.ones_like(sampled).sum()])
    total, count = kernel.gather(sums, "sum").tolist()
    return math.sqrt(total / count)


def check_epsilon(epsilon: float, scale: float) -> None:
    """Refuse what float32 costs cannot answer.

    Raises:
        ProblemError: epsilon 0, or too small.
    """
    if epsilon <= 0:
        raise ProblemError(f"epsilon: {epsilon:g} received, Sinkhorn's algorithm needs > 0", cure="use solver 'auto'")
    if epsilon < SMALLEST_EPSILON * scale:
        raise ProblemError(
            f"epsilon: {epsilon:g} is too small for costs of scale {scale:g} in float32",
            cure=f"raise it over {SMALLEST_EPSILON * scale:.2g}, or give 0 for the exact problem",
        )


@dataclass
class Iteration:
    """The state of the algorithm.

    Attributes:
        kernel: the rows; a subclass may hold a part of them.
        epsilon: the value to reach.
        penalty: the marginal penalty of an unbalanced problem.
        tolerance: see :func:`solve`.
        max_sweeps: see :func:`solve`.
        f, g: potentials.
        last: masses under them; of the columns, before ``g``'s next step.
    """

    kernel: Kernel
    epsilon: float
    penalty: float | None
    tolerance: float
    max_sweeps: int
    sweeps: int = 0
    converged: bool = False
    f: torch.Tensor = field(init=False)
    g: torch.Tensor = field(init=False)
    last: Sweep = field(init=False)

    def solve(self, start: tuple[np.ndarray, np.ndarray] | None) -> None:
        """From potentials to start from, or from nothing, to those asked for."""
        if self.tolerance < SMALLEST_TOLERANCE:
            raise ProblemError(
                f"tolerance: {self.tolerance:g} received, float32 reaches {SMALLEST_TOLERANCE:g}", cure="give more"
            )
        scale = scale_of(self.kernel)
        check_epsilon(self.epsilon, scale)
        if start is None:
            self.descend(scale)
            return
        g = torch.as_tensor(start[1], dtype=torch.float64, device=self.kernel.b.device)
        if g.shape != self.kernel.b.shape or not bool(torch.isfinite(g).all()):
            raise ProblemError(f"start: finite potentials of shape {tuple(self.kernel.b.shape)} expected")
        self.begin(g)
        self.run(self.epsilon, self.tolerance)

    def plan(self, problem: TransportProblem, solver: str, started: float) -> TransportPlan:
        """The plan at the potentials.

        Raises:
            NotConvergedError: it is not what was asked for.
        """
        primal, dual, error = self.bounds()
        certificate = Certificate(
            primal=primal,
            dual=dual,
            marginal_error=error,
            iterations=self.sweeps,
            converged=self.converged,
            solver=solver,
            milliseconds=(time.perf_counter() - started) * 1e3,
        )
        certificate.require_converged()
        return TransportPlan(
            problem.shape, certificate, f=self.f.cpu().numpy(), g=self.g.cpu().numpy(), problem=problem
        )

    def descend(self, scale: float) -> None:
        """From the scale of the costs down to epsilon."""
        self.begin(torch.zeros_like(self.kernel.b))
        epsilon = self.epsilon
        if self.penalty is None:
            while epsilon * FALL < scale:
                epsilon *= FALL
        while epsilon > self.epsilon * 1.5:
            self.run(epsilon, COARSE)
            epsilon /= FALL
        self.run(self.epsilon, self.tolerance)

    def begin(self, g: torch.Tensor) -> None:
        """Start from target potentials."""
        self.g = g
        self.f = self.kernel.transform(g)

    def run(self, epsilon: float, tolerance: float) -> None:
        """Sweep at one epsilon until the marginals are met, rows exactly and columns to a tolerance."""
        proximity = 1.0 if self.penalty is None else self.penalty / (self.penalty + epsilon)
        accelerated = Anderson(self.kernel.b)
        self.converged = False
        while True:
            self._sweep(epsilon, proximity)
            error = self._error(epsilon)
            if not math.isfinite(error):
                raise NotConvergedError(
                    f"Sinkhorn's algorithm left float32's range at epsilon {epsilon:g}",
                    cure="raise epsilon, or give 0 for the exact problem",
                )
            self.converged = error <= tolerance
            if self.converged or self.sweeps >= self.max_sweeps:
                return
            columns = self._columns()
            step = proximity * (self.g - epsilon / LOG2E * columns.log2()) - self.g
            self.g = accelerated.next(self.g, step, error)

    def bounds(self) -> tuple[float, float, float]:
        """Primal, dual and marginal error at the potentials."""
        if self.penalty is not None:
            return bounds.unbalanced(self.kernel, self.f, self.g, self.last, self.epsilon, self.penalty)
        return bounds.balanced(self.kernel, self.f, self.g, self.last, self.epsilon)

    def _sweep(self, epsilon: float, proximity: float) -> None:
        self.last = self.kernel.sweep(self.f, self.g, epsilon, proximity)
        self.f = self.last.f
        self.sweeps += 1

    def _columns(self) -> torch.Tensor:
        """Masses of the columns, none of them 0: a column that nothing reaches starts from its c-transform."""
        columns = self.last.columns
        lost = columns < 1e-30
        if bool(lost.any()):
            self.g = torch.where(lost, self.kernel.column_transform(self.f), self.g)
            columns = torch.where(lost, 1.0, columns)
        return columns

    def _error(self, epsilon: float) -> float:
        if self.penalty is not None and epsilon == self.epsilon:
            primal, dual, _ = self.bounds()
            return (primal - dual) / max(abs(primal), abs(dual), 1e-300)
        rows = self.kernel.total(self.kernel.a * (self.last.rows - 1).abs())
        return rows + float(self.kernel.b @ (self.last.columns - 1).abs())
