"""Transport plans with certificates of their quality."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport.gibbs import GibbsRows
from pipelines.transport.problem import TransportProblem


@dataclass(frozen=True)
class Certificate:
    """Proven bounds on the quality of a plan: ``dual ≤ optimum ≤ primal``, rounded outwards.

    Costs are per unit of mass. By weak duality (Peyré & Cuturi 2019, prop. 2.4) no plan costs less than ``dual``,
    so the plan is within ``gap`` of the optimum. ``pipelines/transport/README.md`` has the proofs;
    :func:`pipelines.transport.verify.verify` computes the bounds again.

    Attributes:
        primal: the objective at the plan: ``<P, C>``, plus ``epsilon KL(P | a bᵀ)`` where epsilon > 0. A plan that
            meets its marginals up to ``marginal_error`` is first rounded to them, so that no optimum is above it.
        dual: a lower bound, from feasible potentials.
        marginal_error: ``‖P 1 − a‖₁ + ‖Pᵀ 1 − b‖₁``.
        iterations: number of iterations of the solver, in its own unit; 0 if it has none.
        converged: whether the solver reached the requested accuracy.
        solver: name of the solver.
        milliseconds: wall time of the solve, including the cost matrix.
        reason: reason for the choice of this solver.
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
        """Primal minus dual: upper bound on the suboptimality of the plan."""
        return self.primal - self.dual

    @property
    def relative_gap(self) -> float:
        """The gap divided by the larger of ``|primal|`` and ``|dual|``; 0 if both are 0."""
        scale = max(abs(self.primal), abs(self.dual))
        return self.gap / scale if scale > 0 else 0.0

    def as_dict(self) -> dict[str, float | int | str | bool]:
        """The fields, the gap and the relative gap, ready for JSON."""
        return asdict(self) | {"gap": self.gap, "relative_gap": self.relative_gap}

    def require_converged(self) -> None:
        """Require that the solver converged and all bounds are finite.

        Raises:
            NotConvergedError: the solver did not converge, or a bound is not finite.
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
    """A transport plan in its most compact form; only :meth:`dense` creates a dense array.

    Attributes:
        shape: (n, m).
        certificate: certificate of the plan.
        assignment: for a permutation, the target of each source point, (n,) int64.
        rows, columns, mass: for a sparse plan, its non-zero entries: (k,) int64, int64, float64.
        f, g: dual potentials, (n,) and (m,) float64, if the solver computes them. Any plan may have them; an entropic
            plan is stored as potentials.
        problem: problem of an entropic plan, which with the potentials determines every entry. None in a response of
            the service and after :meth:`without_points`; planners restore it with :meth:`between`.
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
            ProblemError: for a plan that is stored as potentials: none of its entries is zero. See :meth:`block`.
        """
        if self.assignment is not None:
            n = self.shape[0]
            return np.arange(n), self.assignment, np.full(n, 1 / n)
        if self.rows is None or self.columns is None or self.mass is None:
            raise ProblemError(
                f"a plan of {self.certificate.solver} is stored as potentials: it has no sparse form",
                hint="use block(start, stop), dense(), or pipelines.transport.pairs.draw_pairs(plan, seed)",
            )
        return self.rows, self.columns, self.mass

    def dense(self) -> np.ndarray:
        """The plan as an (n, m) float64 array.

        Raises:
            ProblemError: for a plan that is stored as potentials, without its problem.
        """
        if self.by_potentials:
            return np.concatenate([block.cpu().numpy() for _, block in self.gibbs().blocks()])
        rows, columns, mass = self.entries()
        dense = np.zeros(self.shape)
        np.add.at(dense, (rows, columns), mass)
        return dense

    def block(self, start: int, stop: int) -> RowBlock:
        """Rows ``start … stop − 1``, for the rank that holds these source points.

        For a plan stored as potentials, negligible entries are dropped and their mass is added to the rest of the row;
        see :meth:`GibbsRows.entries`.
        """
        if self.by_potentials:
            return RowBlock(*self.gibbs().entries(start, stop), self.certificate)
        rows, columns, mass = self.entries()
        inside = (rows >= start) & (rows < stop)
        return RowBlock(rows[inside] - start, columns[inside], mass[inside], self.certificate)

    @property
    def by_potentials(self) -> bool:
        """Whether the plan is stored as potentials."""
        return self.assignment is None and self.rows is None

    def gibbs(self) -> GibbsRows:
        """The rows of a plan that is stored as potentials.

        Raises:
            ProblemError: the plan has no potentials, or is without its problem.
        """
        if self.problem is None or self.f is None or self.g is None:
            raise ProblemError(
                f"this plan of {self.certificate.solver} is stored as potentials, without its problem",
                hint="call plan.between(problem) with the problem that it solves",
            )
        return GibbsRows(self.problem, self.f, self.g)

    def between(self, problem: TransportProblem) -> TransportPlan:
        """This plan with its problem, if it is stored as potentials."""
        return replace(self, problem=problem) if self.by_potentials else self

    def without_points(self) -> TransportPlan:
        """This plan without its problem, which takes O(n + m) memory to store or send."""
        return replace(self, problem=None) if self.problem is not None else self


@dataclass(frozen=True, eq=False)
class RowBlock:
    """One rank's rows of a global plan.

    Attributes:
        rows: row indices within the block, (k,) int64.
        columns: column indices over all target points, (k,) int64.
        mass: entries of the global plan, which sum to 1 over all ranks, (k,) float64.
        certificate: certificate of the global plan.
        waited: seconds spent waiting for the plan.
    """

    rows: np.ndarray
    columns: np.ndarray
    mass: np.ndarray
    certificate: Certificate
    waited: float = 0.0
