"""Choice of a solver, and solution of transport problems."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import numpy as np

from pipelines.errors import ProblemError
from pipelines.transport import native
from pipelines.transport.plan import TransportPlan
from pipelines.transport.precision import in_full_precision
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import assignment, brute_force, exact, network_simplex, sinkhorn

SolverName = Literal["auto", "brute-force", "exact", "assignment", "network-simplex", "sinkhorn", "sinkhorn-streaming"]

_SOLVERS: dict[str, Callable[[TransportProblem], TransportPlan]] = {
    "brute-force": brute_force.solve,
    "exact": exact.solve,
    "assignment": assignment.solve,
    "network-simplex": network_simplex.solve,
    "sinkhorn": functools.partial(sinkhorn.solve, streaming=False),
    "sinkhorn-streaming": functools.partial(sinkhorn.solve, streaming=True),
}

_STARTING: dict[str, Callable[[TransportProblem, np.ndarray, np.ndarray], TransportPlan]] = {
    "exact": lambda problem, _, g: exact.solve(problem, g=g),
    "sinkhorn": lambda problem, f, g: sinkhorn.solve(problem, start=(f, g), streaming=False),
    "sinkhorn-streaming": lambda problem, f, g: sinkhorn.solve(problem, start=(f, g), streaming=True),
}


def choose(problem: TransportProblem) -> tuple[str, str]:
    """The solver that ``auto`` selects for a problem, and the reason."""
    if problem.epsilon > 0:
        return sinkhorn.choose_kernel(problem)
    if problem.is_assignment:
        reason = "uniform weights on as many points: an optimal plan is a permutation"
        if not native.native_available():
            return "assignment", f"{reason}; {native.implementation()}"
        return "exact", f"{reason}; {native.implementation()}"
    return "network-simplex", "weighted or rectangular: an optimal plan splits masses"


@in_full_precision
def solve(
    problem: TransportProblem, solver: SolverName = "auto", *, start: TransportPlan | None = None
) -> TransportPlan:
    """Solve a transport problem.

    Args:
        problem: transport problem.
        solver: name of a solver, or ``auto``.
        start: plan of a problem between nearly the same points, in the same order. Solvers that support it start from
            its potentials, without loss of accuracy. For unrelated points it has no benefit.

    Returns:
        A plan with its certificate.

    Raises:
        ProblemError: the solver does not support this kind of problem, or ``start`` has another size.
        NotConvergedError: the solver did not converge; no plan is returned.
    """
    name, reason = (solver, "asked for by name") if solver != "auto" else choose(problem)
    if name not in _SOLVERS:
        raise ProblemError(f"solver: {name!r} is not a solver", hint=f"choose one of auto, {', '.join(_SOLVERS)}")
    if start is not None and start.shape != problem.shape:
        raise ProblemError(
            f"start: a plan of {start.shape[0]} × {start.shape[1]} points received for a problem of "
            f"{problem.shape[0]} × {problem.shape[1]}",
            hint="leave it out for the first problem and where points come or go",
        )
    if start is not None and start.f is not None and start.g is not None and name in _STARTING:
        plan = _STARTING[name](problem, start.f, start.g)
        reason = f"{reason}; from the potentials of a plan before"
    else:
        plan = _SOLVERS[name](problem)
    plan.certificate.require_converged()
    reason = "; ".join(filter(None, (reason, plan.certificate.reason)))
    return dataclasses.replace(plan, certificate=dataclasses.replace(plan.certificate, reason=reason))
