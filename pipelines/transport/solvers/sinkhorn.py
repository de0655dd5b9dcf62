"""Entropic transport by Sinkhorn's algorithm, stabilised, accelerated and certified.

``min <P, C> + epsilon KL(P | a bᵀ)`` has the solution ``P_ij = a_i b_j exp((f_i + g_j − C_ij) / epsilon)`` (Peyré &
Cuturi 2019, prop. 4.3; the marginals as reference measure make the potentials independent of n). The potentials are
stored in float64 and absorbed into a float32 kernel, whose entries then stay near their masses (Schmitzer 2019).
Epsilon decreases from the scale of the costs to its final value (ibid.), and the iteration on the target potentials is
accelerated. The certificate is computed in float64 from the returned plan; if the float32 result is not accurate
enough, the iteration continues with exponents of float64 costs.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport import entropic_bounds
from pipelines.transport.entropic_bounds import EntropicBounds, MarginalWeights
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.precision import in_full_precision
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import network_simplex
from pipelines.transport.solvers.anderson import Anderson
from pipelines.transport.solvers.iteration import LOG2E, IterationResult, Kernel
from pipelines.transport.solvers.rows import CostRows, WideRows, Working
from pipelines.transport.true_cost import TrueCost

TOLERANCE = 1e-3
"""Marginal error at which a plan counts as converged: the L1 norm over both marginals."""

MAX_SWEEPS = 10_000

DENSE_BYTES = 2**31
"""Maximum memory, in bytes, for costs (float64 and float32) and kernel up to which they are kept."""

SMALLEST_EPSILON = 2e-6
"""Smallest epsilon, relative to the scale of the costs, for which float32 costs determine the kernel to some digits."""

FLOAT32_EPSILON = 1e-30
"""Smallest epsilon, in a unit in which costs are about 1, whose inverse is in float32's range."""

FALL = 4.0
"""Ratio of two consecutive values of epsilon. With a larger one, the next kernel could underflow in float32."""

SMALLEST_TOLERANCE = 1e-6
"""Smallest marginal error that float32 sums can distinguish from 0."""

COARSE = 0.1
"""Marginal error at which epsilon decreases."""

POLISHES = 3
"""Maximum number of float64 continuations after the float32 iteration."""

SAMPLED_ROWS = 32


def choose_kernel(problem: TransportProblem) -> tuple[str, str]:
    """Choose whether the cost matrix and its kernel are kept in memory or streamed, and state the reason."""
    n, m = problem.shape
    needed = 16 * n * m
    sizes = f"costs and kernel take {needed / 2**20:.0f} MiB"
    if needed <= DENSE_BYTES:
        return "sinkhorn", f"epsilon > 0; {sizes}"
    return "sinkhorn-streaming", f"epsilon > 0; {sizes}, over the {DENSE_BYTES / 2**20:.0f} that are kept"


def solve(
    problem: TransportProblem,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_SWEEPS,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    streaming: bool | None = None,
) -> TransportPlan:
    """Compute an entropic plan, represented by its potentials.

    Runs on the device of the points.

    Args:
        problem: problem with epsilon > 0.
        tolerance: marginal error to reach, the L1 norm over both marginals; for an unbalanced problem, relative gap.
        max_iterations: maximum number of passes over the kernel.
        start: initial potentials (f, g), e.g. of a similar problem; disables epsilon scaling.
        streaming: True computes the kernel block by block at each iteration, in memory O((n + m) d); False keeps it;
            None decides by its size.

    Returns:
        A plan whose certificate bounds the optimum on both sides: ``dual`` by the potentials, ``primal`` by the plan
        rounded to its marginals (Altschuler, Weed & Rigollet 2017). ``iterations`` counts iterations.

    Raises:
        ProblemError: if epsilon or tolerance is too small for float32, or ``start`` has the wrong shape.
        NotConvergedError: if ``max_iterations`` is not sufficient.
    """
    started = time.perf_counter()
    if streaming is None:
        streaming = choose_kernel(problem)[0] == "sinkhorn-streaming"
    inner, sources, targets = problem.with_weight()
    if start is not None:
        start = _part(start[0], problem.shape[0], sources), _part(start[1], problem.shape[1], targets)
    if inner.matrix is not None and bool(torch.isinf(torch.as_tensor(inner.matrix)).any()):
        network_simplex.check_feasible(inner)
    solution = certify(
        inner,
        Working.of(inner),
        lambda rows, weights: Kernel(rows, weights.a, weights.b, keep=not streaming),
        tolerance=tolerance,
        max_iterations=max_iterations,
        start=start,
        streaming=streaming,
    )
    plan = solution.plan(inner, "sinkhorn-streaming" if streaming else "sinkhorn", started)
    return plan if inner is problem else _completed(problem, plan, sources, targets)


def _part(potentials: np.ndarray, size: int, places: np.ndarray) -> np.ndarray:
    if np.shape(potentials) != (size,):
        raise ProblemError(f"start: finite potentials of shape ({size},) expected, received {np.shape(potentials)}")
    return np.asarray(potentials)[places]


def _completed(
    problem: TransportProblem, plan: TransportPlan, sources: np.ndarray, targets: np.ndarray
) -> TransportPlan:
    """Extend a plan between points with weight to all points; the added potentials meet the marginals."""
    assert plan.f is not None
    assert plan.g is not None
    cost, epsilon = TrueCost(problem), problem.epsilon
    f, g = np.zeros(problem.shape[0]), np.zeros(problem.shape[1])
    f[sources], g[targets] = plan.f, plan.g
    a, b = (torch.as_tensor(side) for side in (problem.source_weights(), problem.target_weights()))
    columns = torch.full((len(g),), -math.inf, dtype=torch.float64)
    for first, found in cost.blocks():
        block = found.cpu()
        inside = slice(first, first + len(block))
        exponents = (torch.as_tensor(g) - block) / epsilon + b.log()
        of_rows = (-epsilon * exponents.logsumexp(1)).nan_to_num(0.0, 0.0, 0.0)
        f[inside] = np.where(a[inside] > 0, f[inside], of_rows)
        of_block = (torch.as_tensor(f[inside])[:, None] - block) / epsilon + a[inside, None].log()
        columns = torch.logaddexp(columns, of_block.logsumexp(0))
    g = np.where(b > 0, g, (-epsilon * columns).nan_to_num(0.0, 0.0, 0.0).numpy())
    return dataclasses.replace(plan, shape=problem.shape, f=f, g=g, problem=problem)


@dataclass(frozen=True, eq=False)
class SinkhornSolution:
    """Potentials of a problem, and proven bounds for their plan."""

    bounds: EntropicBounds
    g: torch.Tensor
    iterations: int
    converged: bool

    def plan(self, problem: TransportProblem, solver: str, started: float) -> TransportPlan:
        """Return the plan of the potentials.

        Raises:
            NotConvergedError: if the plan does not reach the tolerance.
        """
        certificate = Certificate(
            primal=self.bounds.primal,
            dual=self.bounds.dual,
            marginal_error=self.bounds.marginal_error,
            iterations=self.iterations,
            converged=self.converged,
            solver=solver,
            milliseconds=(time.perf_counter() - started) * 1e3,
        )
        certificate.require_converged()
        f, g = self.bounds.f.cpu().numpy(), self.g.cpu().numpy()
        return TransportPlan(problem.shape, certificate, f=f, g=g, problem=problem)


@in_full_precision
def certify(
    problem: TransportProblem,
    working: Working,
    make_kernel: Callable[[CostRows, MarginalWeights], Kernel],
    *,
    tolerance: float,
    max_iterations: int,
    start: tuple[np.ndarray, np.ndarray] | None,
    streaming: bool,
) -> SinkhornSolution:
    """Compute potentials whose plan meets the marginals to a tolerance, checked in float64 with the original numbers.

    Args:
        problem: the problem, or this rank's rows of it; all points have weight.
        working: the same problem in float32.
        make_kernel: creates the kernel of these rows.
        tolerance, max_iterations, start: see :func:`solve`.
        streaming: whether costs are computed again on each read.
    """
    if tolerance < SMALLEST_TOLERANCE:
        raise ProblemError(
            f"tolerance: {tolerance:g} received, float32 reaches {SMALLEST_TOLERANCE:g}", hint="give more"
        )
    cost = TrueCost(problem, keep=not streaming)
    kernel = make_kernel(working.rows(None if streaming else cost), MarginalWeights.of(problem, cost.device))
    weights = MarginalWeights(kernel.a, kernel.b, kernel.gather)
    epsilon, penalty = problem.epsilon / working.unit, problem.marginal_penalty
    solver = SinkhornIteration(
        kernel, epsilon, None if penalty is None else penalty / working.unit, tolerance, max_iterations
    )
    if start is not None:
        start = working.to_own(start[0], source=True), working.to_own(start[1], source=False)
    wide = False
    try:
        solver.solve(start)
    except NotConvergedError:
        # Outside float32's range, but possibly inside float64's.
        solver.kernel, wide = make_kernel(WideRows(cost, working.unit, working.offset), weights), True
        solver.iterations = 0
        solver.solve(start)
    for polish in range(POLISHES + 1):
        f, g = working.from_own(solver.f, source=True), working.from_own(solver.g, source=False)
        if penalty is None:
            bounds = entropic_bounds.balanced(cost, weights, f, g, problem.epsilon)
            converged = bounds.marginal_error <= tolerance
        else:
            bounds = entropic_bounds.unbalanced(cost, weights, f, g, problem.epsilon, penalty)
            converged = bounds.primal - bounds.dual <= tolerance * max(abs(bounds.primal), abs(bounds.dual), 1e-300)
        if converged or not solver.converged or polish == POLISHES:
            break
        if not wide:
            solver.kernel, wide = make_kernel(WideRows(cost, working.unit, working.offset), weights), True
        solver.run(epsilon, 0.8 * tolerance / 2**polish)
    return SinkhornSolution(bounds, g, solver.iterations, converged)


def scale_of(kernel: Kernel) -> float:
    """Estimate the scale of the costs above their minimum, from a sample of rows; the initial epsilon."""
    n = kernel.costs.shape[0]
    sampled = torch.cat([kernel.costs.costs(i, i + 1) for i in range(0, n, max(1, n // SAMPLED_ROWS))]).double()
    sampled = sampled[torch.isfinite(sampled)]
    least = kernel.gather(sampled.amin()[None] if len(sampled) else torch.full((1,), math.inf), "min")
    sums = torch.stack([(sampled - least).square().sum(), torch.ones_like(sampled).sum()])
    total, count = kernel.gather(sums, "sum").tolist()
    return math.sqrt(total / max(count, 1))


def check_epsilon(epsilon: float, scale: float) -> None:
    """Check that float32 costs are precise enough for epsilon.

    Raises:
        ProblemError: if epsilon is 0 or too small.
    """
    if epsilon <= 0:
        raise ProblemError(f"epsilon: {epsilon:g} received, Sinkhorn's algorithm needs > 0", hint="use solver 'auto'")
    if epsilon < max(SMALLEST_EPSILON * scale, FLOAT32_EPSILON):
        size = f"{epsilon / scale:.2g} times the spread of the costs" if scale > 0 else "negligible next to the costs"
        raise ProblemError(
            f"epsilon: {size}, which is too small",
            hint=f"give at least {SMALLEST_EPSILON:g} times their spread, or 0 for the exact problem",
        )


@dataclass
class SinkhornIteration:
    """State of the algorithm.

    Attributes:
        kernel: kernel of all rows, or of this rank's rows.
        epsilon: final value of epsilon.
        penalty: marginal penalty of an unbalanced problem.
        tolerance: see :func:`solve`.
        max_iterations: see :func:`solve`.
        f, g: current potentials.
        last: masses of rows and columns under them; those of the columns before the next step of ``g``.
    """

    kernel: Kernel
    epsilon: float
    penalty: float | None
    tolerance: float
    max_iterations: int
    iterations: int = 0
    converged: bool = False
    f: torch.Tensor = field(init=False)
    g: torch.Tensor = field(init=False)
    last: IterationResult = field(init=False)

    def solve(self, start: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Iterate to the tolerance, from the given potentials or, if None, with epsilon scaling."""
        scale = scale_of(self.kernel)
        check_epsilon(self.epsilon, scale)
        # Rounded costs define a slightly different problem; solving it beyond the rounding error gains nothing.
        tolerance = max(self.tolerance, 2 * self.kernel.costs.roundoff * scale / self.epsilon)
        if start is None:
            self.descend(scale, tolerance)
            return
        g = torch.as_tensor(start[1], dtype=torch.float64, device=self.kernel.b.device)
        if g.shape != self.kernel.b.shape or not bool(torch.isfinite(g).all()):
            raise ProblemError(f"start: finite potentials of shape {tuple(self.kernel.b.shape)} expected")
        self.begin(g)
        self.run(self.epsilon, tolerance)

    def descend(self, scale: float, tolerance: float) -> None:
        """Decrease epsilon from the scale of the costs to its final value, and iterate there to a tolerance."""
        self.begin(torch.zeros_like(self.kernel.b))
        epsilon = self.epsilon
        if self.penalty is None:
            while epsilon * FALL < scale:
                epsilon *= FALL
        while epsilon > self.epsilon * 1.5:
            self.run(epsilon, COARSE)
            epsilon /= FALL
        self.run(self.epsilon, tolerance)

    def begin(self, g: torch.Tensor) -> None:
        """Start from target potentials."""
        self.g = g
        self.f = self.kernel.transform(g)

    def run(self, epsilon: float, tolerance: float) -> None:
        """Iterate at one epsilon until the marginals are met, rows exactly and columns to a tolerance."""
        proximity = 1.0 if self.penalty is None else self.penalty / (self.penalty + epsilon)
        accelerated = Anderson(self.kernel.b)
        self.converged = False
        while True:
            self._iterate(epsilon, proximity)
            error = self._error(epsilon)
            if not math.isfinite(error):
                raise NotConvergedError(
                    f"Sinkhorn's algorithm left float32's range at epsilon {epsilon:g}",
                    hint="raise epsilon, or give 0 for the exact problem",
                )
            self.converged = error <= tolerance
            if self.converged or self.iterations >= self.max_iterations:
                return
            columns = self._columns()
            step = proximity * (self.g - epsilon / LOG2E * columns.log2()) - self.g
            self.g = accelerated.next(self.g, step, error)

    def _iterate(self, epsilon: float, proximity: float) -> None:
        self.last = self.kernel.iterate(self.f, self.g, epsilon, proximity)
        self.f = self.last.f
        self.iterations += 1

    def _columns(self) -> torch.Tensor:
        """Return positive column masses; a column without mass restarts from its c-transform."""
        columns = self.last.columns
        lost = columns < 1e-30
        if bool(lost.any()):
            self.g = torch.where(lost, self.kernel.column_transform(self.f), self.g)
            columns = torch.where(lost, 1.0, columns)
        return columns

    def _error(self, epsilon: float) -> float:
        if self.penalty is not None and epsilon == self.epsilon:
            kernel, rows, columns = self.kernel, self.kernel.a * self.last.rows, self.kernel.b * self.last.columns
            weights = MarginalWeights(kernel.a, kernel.b, kernel.gather)
            primal, dual, _ = entropic_bounds.objectives(weights, rows, columns, self.f, self.g, epsilon, self.penalty)
            return (primal - dual) / max(abs(primal), abs(dual), 1e-300)
        of_rows = self.kernel.total(self.kernel.a * (self.last.rows - 1).abs())
        return of_rows + float(self.kernel.b @ (self.last.columns - 1).abs())
