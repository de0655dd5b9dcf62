"""Verification of plans: check a plan from any solver or service against its problem.

No solver is run. The bounds are computed again in float64 from the problem, block by block, in memory proportional to
the number of points and not of pairs.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from pipelines.errors import CertificateError, NotConvergedError, ProblemError
from pipelines.transport import entropic_bounds
from pipelines.transport.entropic_bounds import MarginalWeights
from pipelines.transport.exact_bounds import GAP_TOLERANCE, MARGINAL_TOLERANCE, Entries, entries_of, exact_bounds
from pipelines.transport.partial_bounds import partial_bounds
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.precision import in_full_precision
from pipelines.transport.problem import TransportProblem
from pipelines.transport.true_cost import TrueCost

CLAIM_TOLERANCE = 2 * GAP_TOLERANCE
"""Tolerated difference between claimed and verified bounds, relative to the cost of the plan."""


@in_full_precision
def verify(problem: TransportProblem, plan: TransportPlan, *, mass: float = 1.0) -> Certificate:
    """Compute bounds for a plan, and compare them with its certificate.

    Time O(n m d), a few matrix products; memory O((n + m) d). Bounds and their rounding are derived in
    :mod:`pipelines.transport.exact_bounds`, :mod:`~pipelines.transport.entropic_bounds` and
    :mod:`~pipelines.transport.rounding`.

    Args:
        problem: transport problem; its points are used, not those stored in the plan.
        plan: plan of any solver, with its potentials.
        mass: mass that a partial plan must move.

    Returns:
        A certificate of the verified bounds, with the solver and iterations of the plan.

    Raises:
        ProblemError: the plan has another shape or kind than the problem, or lacks the potentials that a lower bound
            needs.
        CertificateError: the plan does not match its certificate.
    """
    started = time.perf_counter()
    if plan.shape != problem.shape:
        raise ProblemError(
            f"plan: {plan.shape[0]} × {plan.shape[1]} received for a problem of "
            f"{problem.shape[0]} × {problem.shape[1]} points"
        )
    if plan.by_potentials != (problem.epsilon > 0):
        kind = "held by its potentials" if plan.by_potentials else "with entries of its own"
        raise ProblemError(f"plan: one {kind} received for a problem with epsilon {problem.epsilon:g}")
    f, g = _potentials(plan)
    if plan.by_potentials:
        primal, dual, error, allowed, off = _entropic(problem, plan, f, g)
        converged = error <= plan.certificate.marginal_error + MARGINAL_TOLERANCE + off
    else:
        entries = _entries(plan)
        bounds = exact_bounds(problem, entries, g) if mass == 1 else partial_bounds(problem, entries, f, g, mass)
        primal, dual, error = bounds.primal, bounds.dual, bounds.marginal_error
        allowed = CLAIM_TOLERANCE * bounds.size + 4 * bounds.resolution
        off = 0.0
        converged = bounds.closed and error <= MARGINAL_TOLERANCE
    found = Certificate(
        primal=primal,
        dual=dual,
        marginal_error=error,
        iterations=plan.certificate.iterations,
        converged=converged,
        solver=plan.certificate.solver,
        milliseconds=(time.perf_counter() - started) * 1e3,
        reason="verified",
    )
    _compare(plan.certificate, found, allowed, MARGINAL_TOLERANCE + off)
    return found


def _compare(claimed: Certificate, found: Certificate, allowed: float, of_masses: float) -> None:
    """Raise an error if a certificate claims more than was verified.

    Args:
        claimed: certificate of the plan.
        found: verified certificate.
        allowed: difference of costs that is attributed to rounding.
        of_masses: difference of marginal errors that is attributed to rounding.
    """
    faults = []
    if not abs(claimed.primal - found.primal) <= allowed:
        faults.append(f"claims to cost {claimed.primal:.17g} and costs {found.primal:.17g}")
    if not claimed.dual <= found.dual + allowed:
        faults.append(f"claims a lower bound of {claimed.dual:.17g}, its potentials prove {found.dual:.17g}")
    if not found.marginal_error <= claimed.marginal_error + of_masses:
        faults.append(f"claims a marginal error of {claimed.marginal_error:g} and has {found.marginal_error:g}")
    if claimed.converged and not found.converged and not faults:
        faults.append(f"claims to be optimal, and is proven to a gap of {found.gap:g}")
    if faults:
        raise CertificateError(
            f"the plan of {claimed.solver} is not what its certificate says: it {'; it '.join(faults)}",
            hint="do not use it; check that it belongs to this problem, then report the solver",
        )


def _potentials(plan: TransportPlan) -> tuple[np.ndarray, np.ndarray]:
    if plan.f is None or plan.g is None:
        raise ProblemError(
            f"plan: one of {plan.certificate.solver} without potentials received: a lower bound needs them",
            hint="ask the service for them: POST /v1/plans?potentials=true",
        )
    f, g = np.asarray(plan.f, np.float64), np.asarray(plan.g, np.float64)
    if (len(f), len(g)) != plan.shape:
        raise ProblemError(f"plan: {len(f)} and {len(g)} potentials received for a shape of {plan.shape}")
    return f, g


def _entries(plan: TransportPlan) -> Entries:
    """Validated entries of a plan from an untrusted origin."""
    rows, columns, mass = plan.entries()
    if not len(rows) == len(columns) == len(mass):
        raise CertificateError(f"the plan has {len(rows)} rows, {len(columns)} columns and {len(mass)} masses")
    for name, places, size in (("rows", rows, plan.shape[0]), ("columns", columns, plan.shape[1])):
        if len(places) and not (places.min() >= 0 and places.max() < size):
            raise CertificateError(f"the plan has {name} from {places.min()} to {places.max()}, of {size}")
    if not (np.isfinite(mass).all() and (mass >= 0).all()):
        raise CertificateError("the plan has masses that are negative or not finite")
    return entries_of(plan)


def _entropic(
    problem: TransportProblem, plan: TransportPlan, f: np.ndarray, g: np.ndarray
) -> tuple[float, float, float, float, float]:
    """Primal, dual and marginal error of an entropic plan, and the tolerances of costs and errors."""
    # Points without weight carry no mass; their potentials may be anything.
    inner, sources, targets = problem.with_weight()
    cost = TrueCost(inner)
    weights = MarginalWeights.of(inner, cost.device)
    of_rows, of_columns = (torch.as_tensor(side, device=cost.device) for side in (f[sources], g[targets]))
    if not bool(torch.isfinite(of_rows).all() and torch.isfinite(of_columns).all()):
        raise CertificateError(f"the plan of {plan.certificate.solver} has potentials that are not finite")
    try:
        if problem.marginal_penalty is not None:
            bounds = entropic_bounds.unbalanced(
                cost, weights, of_rows, of_columns, problem.epsilon, problem.marginal_penalty
            )
            error, off = bounds.marginal_error, 0.0
        else:
            error, off = entropic_bounds.marginal_error(cost, weights, of_rows, of_columns, problem.epsilon)
            bounds = entropic_bounds.balanced(cost, weights, of_rows, of_columns, problem.epsilon)
    except NotConvergedError as unproven:
        raise CertificateError(
            f"the plan of {plan.certificate.solver} cannot be verified: {unproven.args[0]}"
        ) from None
    size = weights.total((weights.a * of_rows).abs()) + float((weights.b * of_columns).abs().sum())
    # The claim allows for rounding, and so does what is found here.
    allowed = CLAIM_TOLERANCE * (size + problem.epsilon) + bounds.ambiguous
    return bounds.primal, bounds.dual, error + off, allowed, 2 * off
