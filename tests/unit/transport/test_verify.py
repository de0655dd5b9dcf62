"""Verification rejects a plan that does not match its certificate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from pipelines.errors import CertificateError, ProblemError
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from pipelines.transport.solvers import partial
from pipelines.transport.verify import verify

N, M = 40, 30
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((N, 3)), RNG.standard_normal((M, 3))
SQUARE = TransportProblem.between(X, RNG.standard_normal((N, 3)))
WEIGHTED = TransportProblem.between(X, Y)
ENTROPIC = TransportProblem.between(X, Y, epsilon=0.5)
UNBALANCED = TransportProblem.between(X, Y, epsilon=0.5, marginal_penalty=1.0)
PROBLEMS = {"square": SQUARE, "weighted": WEIGHTED, "entropic": ENTROPIC, "unbalanced": UNBALANCED}


def claiming(plan: TransportPlan, **claims: float) -> TransportPlan:
    return dataclasses.replace(plan, certificate=dataclasses.replace(plan.certificate, **claims))


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_found_is_what_the_solver_claims(name: str) -> None:
    plan = solve(PROBLEMS[name])
    found = verify(PROBLEMS[name], plan)
    assert found.converged
    assert found.primal == pytest.approx(plan.certificate.primal, rel=1e-9)
    assert found.dual == pytest.approx(plan.certificate.dual, rel=1e-9)
    assert found.marginal_error == pytest.approx(plan.certificate.marginal_error, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"primal": c.primal * (1 - 1e-6), "dual": c.dual - 1}, "claims to cost"),
        (lambda c: {"dual": c.dual + 1e-5 * abs(c.primal)}, "claims a lower bound"),
    ],
)
def test_bounds_that_are_not_borne_out(name: str, change: Callable[..., dict[str, float]], message: str) -> None:
    plan = solve(PROBLEMS[name])
    with pytest.raises(CertificateError, match=message):
        verify(PROBLEMS[name], claiming(plan, **change(plan.certificate)))


@pytest.mark.parametrize("name", ["square", "weighted", "entropic"])
def test_a_plan_of_other_points(name: str) -> None:
    problem = PROBLEMS[name]
    assert problem.x is not None
    assert problem.y is not None
    other = dataclasses.replace(problem, x=problem.x[::-1].copy())
    with pytest.raises(CertificateError, match="is not what its certificate says"):
        verify(other, solve(problem))


def test_a_marginal_error_that_is_played_down() -> None:
    plan = solve(ENTROPIC)
    assert plan.certificate.marginal_error > 1e-6
    with pytest.raises(CertificateError, match="claims a marginal error of 0"):
        verify(ENTROPIC, claiming(plan, marginal_error=0.0))
    sparse = solve(WEIGHTED)
    assert sparse.mass is not None
    missing = dataclasses.replace(sparse, mass=np.where(np.arange(len(sparse.mass)) == 0, 0.0, sparse.mass))
    with pytest.raises(CertificateError, match="marginal error"):
        verify(WEIGHTED, missing)


def test_a_plan_that_is_not_optimal() -> None:
    """The plan's cost and the bound of the optimum are correct, but it claims to have converged."""
    plan = solve(SQUARE)
    assert plan.assignment is not None
    swapped = plan.assignment.copy()
    swapped[:2] = swapped[1::-1]
    dearer = dataclasses.replace(plan, assignment=swapped)
    with pytest.raises(CertificateError, match="claims to cost") as caught:
        verify(SQUARE, dearer)
    cost = float(str(caught.value).split(" and costs ")[1].split("\n")[0].split(";")[0])
    with pytest.raises(CertificateError, match="claims to be optimal"):
        verify(SQUARE, claiming(dearer, primal=cost))


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": np.array([-1])},
        {"columns": np.array([10**12])},
        {"mass": np.array([np.nan])},
        {"mass": np.array([-1.0])},
        {"mass": np.ones(2)},
    ],
)
def test_entries_that_are_none(damage: dict[str, np.ndarray]) -> None:
    parts = {"rows": np.array([0]), "columns": np.array([0]), "mass": np.array([1.0])} | damage
    with pytest.raises(CertificateError, match="the plan has"):
        verify(WEIGHTED, dataclasses.replace(solve(WEIGHTED), **parts))


def test_a_partial_plan() -> None:
    plan = partial.solve(WEIGHTED, mass=0.4)
    assert verify(WEIGHTED, plan, mass=0.4).converged
    with pytest.raises(CertificateError):
        verify(WEIGHTED, plan, mass=0.5)
    with pytest.raises(CertificateError):
        verify(WEIGHTED, plan)


def test_what_cannot_be_verified() -> None:
    plan = solve(WEIGHTED)
    with pytest.raises(ProblemError, match="without potentials"):
        verify(WEIGHTED, dataclasses.replace(plan, f=None))
    with pytest.raises(ProblemError, match="received for a problem of"):
        verify(SQUARE, plan)
    with pytest.raises(ProblemError, match="held by its potentials"):
        verify(WEIGHTED, solve(ENTROPIC))
    unknown = dataclasses.replace(solve(ENTROPIC), f=np.full(N, np.nan))
    with pytest.raises(CertificateError, match="not finite"):
        verify(ENTROPIC, unknown)


@pytest.mark.parametrize("name", ["weighted", "entropic"])
def test_no_matrix_is_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one row give the same result."""
    plan = solve(PROBLEMS[name])
    whole = verify(PROBLEMS[name], plan)
    monkeypatch.setattr("pipelines.transport.true_cost.BLOCK", 1)
    by_rows = verify(PROBLEMS[name], plan)
    assert by_rows.primal == pytest.approx(whole.primal, rel=1e-12)
    assert by_rows.dual == pytest.approx(whole.dual, rel=1e-12)
