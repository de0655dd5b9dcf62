"""Choose a solver, run it, and refuse what did not converge."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from pipelines.errors import ProblemError
from pipelines.transport import native
from pipelines.transport.cost import with_known_cost
from pipelines.transport.plan import TransportPlan
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


def choose(problem: TransportProblem) -> tuple[str, str]:
    """The solver that ``auto`` takes for a problem, and why."""
    if problem.epsilon > 0:
        return sinkhorn.choose(problem)
    if problem.is_assignment:
        reason = "uniform weights on as many points: an optimal plan is a permutation"
        if native.native_available():
            return "exact", reason
        return "assignment", f"{reason}; no native build"
    return "network-simplex", "weighted or rectangular: an optimal plan splits masses"


def solve(problem: TransportProblem, solver: SolverName = "auto") -> TransportPlan:
    """Solve a transport problem.

    Args:
        problem: what to solve.
        solver: a solver's name, or ``auto``.

    Returns:
        A plan with its certificate.

    Raises:
        ProblemError: the solver does not take this kind of problem.
        NotConvergedError: the solver stopped short; nothing is returned in its place.
    """
    name, reason = (solver, "asked for by name") if solver != "auto" else choose(problem)
    if name not in _SOLVERS:
        raise ProblemError(f"solver: {name!r} is not a solver", cure=f"choose one of auto, {', '.join(_SOLVERS)}")
    plan = _SOLVERS[name](with_known_cost(problem))
    plan.certificate.require_converged()
    reason = "; ".join(filter(None, (reason, plan.certificate.reason)))
    return dataclasses.replace(plan, certificate=dataclasses.replace(plan.certificate, reason=reason))
