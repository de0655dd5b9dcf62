"""The answer to a transport problem, with the proof of its quality."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport.gibbs import GibbsRows
from pipelines.transport.problem import TransportProblem


@dataclass(frozen=True)
class Certificate:
    """How good a plan is, by bounds that are proven: ``dual ≤ optimum ≤ primal``, rounded outwards.

    Costs are per unit of mass. By weak duality (Peyré & Cuturi 2019, prop. 2.4) no plan costs less than ``dual``,
    so the plan is within ``gap`` of the best one. ``pipelines/transport/README.md`` has the proofs;
    :func:`pipelines.transport.verify.verify` finds the bounds anew.

    Attributes:
        primal: the objective at the plan: ``<P, C>``, plus ``epsilon KL(P | a bᵀ)`` where epsilon > 0. A plan that
            meets its marginals up to ``marginal_error`` is first rounded to them, so that no optimum is above it.
        dual: a lower bound, from feasible potentials.
        marginal_error: ``‖P 1 − a‖₁ + ‖Pᵀ 1 − b‖₁``.
        iterations: of the solver, in its own unit; 0 where it has none.
        converged: whether the solver reached what was asked of it.
        solver: its name.
        milliseconds: wall time of the solve, the cost matrix included.
        reason: why this solver was chosen.
    """

    primal: float
    dual: float
    marginal_error: float
    iterations: int
    converged: bool
    solver: str
    milliseconds: float
    reason: str = ""

    @property
    def gap(self) -> float:
        """Primal minus dual: how far from optimal the plan can be at most."""
        return self.primal - self.dual

    @property
    def relative_gap(self) -> float:
        """The gap as a fraction of the primal cost; 0 where both are 0."""
        scale = max(abs(self.primal), abs(self.dual))
        return self.gap / scale if scale > 0 else 0.0

    def as_dict(self) -> dict[str, float | int | str | bool]:
        """The fields, the gap and the relative gap, ready for JSON."""
        return asdict(self) | {"gap": self.gap, "relative_gap": self.relative_gap}

    def require_converged(self) -> None:
        """Refuse a plan that is not what was asked for.

        Raises:
            NotConvergedError: when the solver did not converge or a bound is not finite.
        """
        bounds = (self.primal, self.dual, self.marginal_error)
        if not self.converged or not all(math.isfinite(bound) for bound in bounds):
            raise NotConvergedError(
                f"{self.solver} stopped after {self.iterations} iterations with gap {self.gap:g} "
                f"and marginal error {self.marginal_error:g}",
                hint="allow more iterations" + (", or raise epsilon" if self.solver.startswith("sinkhorn") else ""),
            )


@dataclass(frozen=True, eq=False)
class TransportPlan:
    """A plan in the smallest form that holds it; never a dense array unless :meth:`dense` asks for one.

    Attributes:
        shape: (n, m).
        certificate: the proof of its quality.
        assignment: for a permutation, the target of each source point, (n,) int64.
        rows, columns, mass: for a sparse plan, its non-zero entries: (k,) int64, int64, float64.
        f, g: dual potentials, (n,) and (m,) float64, where the solver has them. Any plan may carry them; an
            entropic plan is stored by them alone.
        problem: of an entropic plan: with the potentials it gives every entry. A plan that comes from a service is
            without it until :meth:`between` brings it back.
    """

    shape: tuple[int, int]
    certificate: Certificate
    assignment: np.ndarray | None = None
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    mass: np.ndarray | None = None
    f: np.ndarray | None = None
    g: np.ndarray | None = None
    problem: TransportProblem | None = None

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Non-zero entries ``(rows, columns, mass)``; the mass sums to 1.

        Raises:
            ProblemError: for a plan that is held by its potentials, which has no zero entries; see :meth:`block`.
        """
        if self.assignment is not None:
            n = self.shape[0]
            return np.arange(n), self.assignment, np.full(n, 1 / n)
        if self.rows is None or self.columns is None or self.mass is None:
            raise ProblemError(
                f"a plan of {self.certificate.solver} has no zero entries to leave out",
                hint="draw pairs from it, or ask for it dense",
            )
        return self.rows, self.columns, self.mass

    def dense(self) -> np.ndarray:
        """The plan as an (n, m) float64 array.

        Raises:
            ProblemError: for a plan that is held by its potentials and has lost its problem.
        """
        if self.by_potentials:
            return np.concatenate([block.cpu().numpy() for _, block in self.gibbs().blocks()])
        rows, columns, mass = self.entries()
        dense = np.zeros(self.shape)
        np.add.at(dense, (rows, columns), mass)
        return dense

    def block(self, start: int, stop: int) -> RowBlock:
        """The rows ``start … stop − 1``, for the rank that holds these source points.

        Of a plan held by its potentials, the entries that carry mass; see :meth:`GibbsRows.entries`.
        """
        if self.by_potentials:
            return RowBlock(*self.gibbs().entries(start, stop), self.certificate)
        rows, columns, mass = self.entries()
        inside = (rows >= start) & (rows < stop)
        return RowBlock(rows[inside] - start, columns[inside], mass[inside], self.certificate)

    @property
    def by_potentials(self) -> bool:
        """Whether the plan is held by its potentials alone."""
        return self.assignment is None and self.rows is None

    def gibbs(self) -> GibbsRows:
        """The rows of a plan that is held by its potentials.

        Raises:
            ProblemError: the plan has no potentials, or has lost its problem.
        """
        if self.problem is None or self.f is None or self.g is None:
            raise ProblemError(
                f"this plan of {self.certificate.solver} does not hold its points",
                hint="give them: plan.between(problem)",
            )
        return GibbsRows(self.problem, self.f, self.g)

    def between(self, problem: TransportProblem) -> TransportPlan:
        """The same plan holding the problem that it solves, if it is held by its potentials."""
        return replace(self, problem=problem) if self.by_potentials else self

    def without_points(self) -> TransportPlan:
        """The same plan without its problem: what is kept or sent is then O(n + m)."""
        return replace(self, problem=None) if self.problem is not None else self


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Some rows of a plan: what one rank needs of a global one.

    Attributes:
        rows: (k,) int64, counted within the block.
        columns: (k,) int64, counted over all target points.
        mass: (k,) float64, as in the whole plan.
        certificate: that of the whole plan.
        waited: seconds spent waiting for the plan.
    """

    rows: np.ndarray
    columns: np.ndarray
    mass: np.ndarray
    certificate: Certificate
    waited: float = 0.0
