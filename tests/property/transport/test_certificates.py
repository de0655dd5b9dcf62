"""``dual ≤ optimum ≤ primal`` for problems of many shapes and all solvers, checked in extended precision.

``MONGE_EXAMPLES`` sets the number of examples: the test suite runs a part of the search, a release runs all of it.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from solving import all_plans
from true_costs import FINER, LONG, Case, cases

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport.exact_bounds import GAP_TOLERANCE
from pipelines.transport.plan import TransportPlan
from pipelines.transport.solve import solve
from pipelines.transport.solvers import one_dimensional, partial, sliced
from pipelines.transport.verify import verify

EXAMPLES = int(os.environ.get("MONGE_EXAMPLES", "60"))
LAWS = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
pytestmark = pytest.mark.skipif(not FINER, reason="this processor has no numbers finer than float64")

UNIT = 2.0**-53
LARGE = 1e5


def check_primal(case: Case, plan: TransportPlan, mass: float = 1.0) -> None:
    """Check that the primal is at least the plan's true cost, and exceeds it at most by rounding."""
    rows, columns, moved = plan.entries()
    moved = moved.astype(LONG)
    paid = case.costs[rows, columns]
    assert np.isfinite(paid.astype(float)).all(), "a forbidden pair is used"
    true, size = (moved * paid).sum(), (moved * np.abs(paid)).sum()
    off = (moved * case.error[rows, columns]).sum()
    # Where masses are known to float64, so are costs.
    rounding = 4 * UNIT * len(moved) * size
    resolution = 8 * (case_resolution(case, rows, columns) * moved).sum()
    found = LONG(plan.certificate.primal)
    assert found >= true - off - rounding
    assert found - true <= 1e-9 * size + off + resolution + max_cost(case) * (plan.certificate.marginal_error + 1e-300)
    sent = np.bincount(rows, moved.astype(float), len(case.a))
    met = np.bincount(columns, moved.astype(float), len(case.b))
    if mass == 1.0:
        error = np.abs(sent - case.a).sum() + np.abs(met - case.b).sum()
        assert error <= 1e-9
    else:
        assert (sent <= case.a + 1e-12).all()
        assert (met <= case.b + 1e-12).all()
        assert abs(moved.sum() - mass) <= 1e-12


def case_resolution(case: Case, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bound the error of float64 costs between nearly parallel vectors."""
    if case.problem.cost != "cosine" or case.problem.x is None:
        return np.zeros(len(rows), LONG)
    return 8 * UNIT * np.sqrt(2 * np.abs(case.costs[rows, columns])) + ((case.problem.x.shape[1] + 8) * UNIT) ** 2


def max_cost(case: Case) -> float:
    finite = np.abs(case.costs[np.isfinite(case.costs.astype(float))]).astype(float)
    return float(finite.max(initial=0.0))


def check_dual(case: Case, plan: TransportPlan) -> None:
    """Check that potentials are feasible for the true costs, with a value of at least the certificate's dual."""
    assert plan.f is not None
    assert plan.g is not None
    f, g = plan.f.astype(LONG), plan.g.astype(LONG)
    over = f[:, None] + g - case.costs - case.error
    assert over.max() <= 0, f"infeasible by {over.max()}"
    own = (case.a * f).sum() + (case.b * g).sum()
    # The sums of weights that float64 holds differ from 1.
    drift = abs((case.a.sum() - 1) * np.abs(f).max()) + abs((case.b.sum() - 1) * np.abs(g).max())
    assert LONG(plan.certificate.dual) <= own + 4 * drift + UNIT * abs(own)


def check_exact(case: Case, plan: TransportPlan, best: float) -> None:
    check_primal(case, plan)
    check_dual(case, plan)
    certificate = plan.certificate
    assert certificate.converged
    rows, columns, moved = plan.entries()
    size = float((moved * np.abs(case.costs[rows, columns])).sum())
    smallest = np.abs(case.costs[case.costs != 0]).min(initial=np.inf)
    resolution = float((case_resolution(case, rows, columns) * moved).sum())
    assert certificate.gap <= 2 * GAP_TOLERANCE * (size or float(smallest)) + 64 * resolution
    # SciPy's plan is as good as its own tolerance.
    slack = 1e-9 * abs(best) + 1e-12 * size + 8 * resolution + 4 * UNIT * len(case.a) * max_cost(case)
    assert certificate.dual <= best + slack
    verify(case.problem, plan)


def best_of_scipy(case: Case) -> float | None:
    """Compute the true cost of SciPy's plan; None if SciPy finds no plan or fails."""
    n, m = case.problem.shape
    costs = case.costs.astype(float)
    finite = np.isfinite(costs)
    if not finite.any():
        return None
    # Of any offset and unit.
    low, high = costs[finite].min(), costs[finite].max()
    normal = (costs - low) / (high - low) if high > low else np.where(finite, 0.0, np.inf)
    if case.problem.is_assignment:
        if (maximum_bipartite_matching(csr_array(finite), perm_type="column") < 0).any():
            return None
        rows, columns = linear_sum_assignment(normal)
        return float(case.costs[rows, columns].mean())
    allowed = np.flatnonzero(finite.ravel())
    equal = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])[:, allowed]
    sums = np.concatenate([case.a, case.b]).astype(float)
    # HiGHS meets marginals up to 1e-7, which must be small compared with the smallest weight.
    found = linprog(normal.ravel()[allowed], A_eq=equal[:-1], b_eq=LARGE * sums[:-1], method="highs")
    if found.status != 0:
        return None if found.status == 2 and not finite.all() else float("inf")
    moved = found.x.clip(0).astype(LONG)
    moved /= moved.sum()
    # What they miss counts at the dearest cost.
    met = np.abs(equal @ moved.astype(float) - sums).sum()
    return float((moved * case.costs.ravel()[allowed]).sum()) + float(met) * (max_cost(case) + abs(float(low)))


@LAWS
@given(case=cases(entropic=False))
def test_exact_plans(case: Case) -> None:
    note(case.text)
    best = best_of_scipy(case)
    try:
        plans = all_plans(case.problem)
    except AssertionError:  # not even `auto` takes it
        with pytest.raises(ProblemError, match="infeasible"):
            solve(case.problem)
        assert best is None, "SciPy has a plan"
        return
    assert best is not None, "SciPy has no plan"
    for name, plan in plans.items():
        note(name)
        check_exact(case, plan, best)


@LAWS
@given(case=cases(entropic=False), mass=st.sampled_from([0.01, 0.5, 0.9]))
def test_plans_of_other_solvers(case: Case, mass: float) -> None:
    note(case.text)
    problem = case.problem
    try:
        plan = partial.solve(problem, mass=mass)
    except ProblemError as error:
        assert "forbid" in str(error)  # noqa: PT017
    except NotConvergedError:
        # Nearly parallel vectors: the bounds are as far apart as float64 leaves the cosines.
        assert problem.cost == "cosine"
        assert max_cost(case) < 1e-6
    else:
        check_primal(case, plan, mass)
        assert verify(problem, plan, mass=mass).converged
    if problem.matrix is None and problem.cost == "squared-euclidean":
        found = sliced.solve(problem, directions=4)
        check_primal(case, found)
        best = solve(problem).certificate
        # Masses that rounding leaves out would have moved somewhere.
        missing = (found.certificate.marginal_error + best.marginal_error) * max_cost(case)
        assert found.certificate.dual <= best.primal + missing
        assert found.certificate.primal >= best.dual - missing
        assert problem.x is not None
        if problem.x.shape[1] == 1:
            check_exact(case, one_dimensional.solve(problem), best.primal)


@LAWS
@given(case=cases(entropic=True))
def test_entropic_plans(case: Case) -> None:
    note(case.text)
    problem = case.problem
    try:
        plan = solve(problem)
    except NotConvergedError:
        return  # an error, and no worse plan
    except ProblemError as error:
        if "infeasible" in str(error):
            assert best_of_scipy(case) is None
        else:
            assert "epsilon" in str(error)  # noqa: PT017
        return
    check_entropic(case, plan)
    verify(problem, plan)


def check_entropic(case: Case, plan: TransportPlan) -> None:
    certificate, epsilon = plan.certificate, LONG(case.problem.epsilon)
    assert plan.f is not None
    assert plan.g is not None
    a, b, f, g = case.a, case.b, plan.f.astype(LONG), plan.g.astype(LONG)
    weight = a[:, None] * b
    with np.errstate(over="ignore"):
        true = np.where(weight > 0, weight * np.exp((f[:, None] + g - case.costs) / epsilon), 0)
    dense = plan.dense()
    # What is handed out is what is certified.
    np.testing.assert_allclose(dense, true.astype(float), rtol=1e-2, atol=1e-300)
    error = np.abs(dense.sum(1) - a).sum() + np.abs(dense.sum(0) - b).sum()
    assert error <= certificate.marginal_error + 1e-13
    assert certificate.marginal_error <= 1e-3
    # The dual objective at the potentials, for the true costs.
    sizes = (a * np.abs(f)).sum() + (b * np.abs(g)).sum()
    dual = (a * f).sum() + (b * g).sum() - epsilon * (true.sum() - a.sum() * b.sum())
    assert LONG(certificate.dual) <= dual + 1e-14 * sizes + 1e-15 * epsilon
    assert certificate.primal >= certificate.dual
    assert LONG(certificate.primal) >= dual - 1e-14 * sizes
    # The objective of a plan with these marginals: rows, then columns scaled down, the rest as a product.
    kept = true * np.minimum(1, a / np.where(true.sum(1) > 0, true.sum(1), 1))[:, None]
    kept = kept * np.minimum(1, b / np.where(kept.sum(0) > 0, kept.sum(0), 1))
    lost = [(a - kept.sum(1)).clip(0), (b - kept.sum(0)).clip(0)]
    if not np.isfinite(case.costs.astype(float)).all():
        return  # around forbidden pairs the primal may lie far above
    if lost[0].sum() > 0:
        kept = kept + np.outer(lost[0], lost[1]) / lost[0].sum()
    paid = np.where(kept > 0, kept * np.where(kept > 0, case.costs, 0), 0).sum()
    ratio = np.where(kept > 0, kept / np.where(weight > 0, weight, 1), 1)
    objective = paid + epsilon * (kept * np.log(ratio)).sum()
    # The optimum lies between the true dual and this, and the primal not far above.
    spread = float(max_cost(case)) + 60 * float(epsilon) + float(np.abs(f).max() + np.abs(g).max())
    assert LONG(certificate.primal) <= objective + 20 * certificate.marginal_error * spread + 1e-9 * sizes
