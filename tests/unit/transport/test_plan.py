"""Plans, their rows, and certificates."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport.plan import Certificate, TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve

GOOD = Certificate(
    primal=2.0, dual=1.5, marginal_error=0.0, iterations=3, converged=True, solver="some", milliseconds=1.0
)
PERMUTATION = TransportPlan((4, 4), GOOD, assignment=np.array([2, 0, 3, 1]))
SPARSE = TransportPlan(
    (3, 2), GOOD, rows=np.array([0, 1, 1, 2]), columns=np.array([0, 0, 1, 1]), mass=np.array([0.25, 0.25, 0.125, 0.375])
)


def test_a_gap_is_what_is_left_to_prove() -> None:
    assert GOOD.gap == 0.5
    assert GOOD.relative_gap == 0.25
    assert dataclasses.replace(GOOD, primal=0.0, dual=0.0).relative_gap == 0.0
    assert dataclasses.replace(GOOD, primal=-1.5, dual=-2.0).relative_gap == 0.25


def test_a_certificate_is_ready_for_json() -> None:
    told = json.loads(json.dumps(GOOD.as_dict()))
    assert told["gap"] == 0.5
    assert told["relative_gap"] == 0.25
    assert set(told) == {field.name for field in dataclasses.fields(Certificate)} | {"gap", "relative_gap"}


@pytest.mark.parametrize(
    "flaw",
    [{"converged": False}, {"primal": math.nan}, {"dual": -math.inf}, {"marginal_error": math.nan}],
    ids=lambda flaw: next(iter(flaw)),
)
def test_what_did_not_converge_is_refused(flaw: dict) -> None:
    GOOD.require_converged()
    with pytest.raises(NotConvergedError, match=r"some stopped after 3 iterations with gap .*\n.*hint: allow more"):
        dataclasses.replace(GOOD, **flaw).require_converged()


def test_a_permutation_in_all_its_forms() -> None:
    rows, columns, mass = PERMUTATION.entries()
    assert (rows.tolist(), columns.tolist(), mass.tolist()) == ([0, 1, 2, 3], [2, 0, 3, 1], [0.25] * 4)
    assert np.array_equal(PERMUTATION.dense(), np.eye(4)[[2, 0, 3, 1]] / 4)


def test_a_sparse_plan_in_all_its_forms() -> None:
    assert SPARSE.dense().tolist() == [[0.25, 0.0], [0.25, 0.125], [0.0, 0.375]]
    twice = dataclasses.replace(SPARSE, rows=np.array([0, 0, 1, 2]), columns=np.array([0, 0, 1, 1]))
    assert twice.dense()[0, 0] == 0.5


@pytest.mark.parametrize("plan", [PERMUTATION, SPARSE], ids=["permutation", "sparse"])
def test_blocks_are_the_plan_cut_by_rows(plan: TransportPlan) -> None:
    dense = plan.dense()
    for cuts in ([0, 1, 3], [0, 0, 2], [0, 3, 3]):
        bounds = [*cuts, plan.shape[0]]
        for start, stop in itertools.pairwise(bounds):
            block = plan.block(start, stop)
            assert block.certificate is plan.certificate
            part = np.zeros((stop - start, plan.shape[1]))
            part[block.rows, block.columns] = block.mass
            assert np.array_equal(part, dense[start:stop])


def test_a_plan_without_entries_says_so() -> None:
    plan = TransportPlan((2, 2), GOOD, f=np.zeros(2), g=np.zeros(2))
    with pytest.raises(
        ProblemError, match=r"of some is stored as potentials: it has no sparse form\n.*hint: use block"
    ):
        plan.entries()


def test_a_plan_says_who_made_it_and_why() -> None:
    points = np.arange(6.0).reshape(3, 2)
    chosen = solve(TransportProblem.between(points, points)).certificate
    assert "permutation" in chosen.reason
    split = solve(TransportProblem.between(points, points[:2])).certificate
    assert "splits masses" in split.reason
    asked = solve(TransportProblem.between(points, points), "brute-force").certificate
    assert asked.solver == "brute-force"
    assert "asked for by name" in asked.reason
    assert all(certificate.milliseconds > 0 for certificate in (chosen, split, asked))
