"""Problems with known plans."""

import itertools
import math

import numpy as np
import pytest
from solving import COSTS, all_plans

from pipelines.spec import CostName
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve


def cloud(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def targets(problem: TransportProblem) -> dict[str, list[int]]:
    """Return the target of each source, by solver."""
    return {name: plan.dense().argmax(1).tolist() for name, plan in all_plans(problem).items()}


def test_six_points_have_720_permutations_and_one_is_best() -> None:
    """The example of the article."""
    x, y = cloud(6, 2), cloud(6, 2, seed=1)
    problem = TransportProblem.between(x, y, cost="euclidean")
    tried = solve(problem, "brute-force")
    assert tried.certificate.iterations == math.factorial(6) == 720
    totals = {
        order: sum(float(np.linalg.norm(x[i] - y[j])) for i, j in enumerate(order))
        for order in itertools.permutations(range(6))
    }
    best = min(totals, key=lambda order: totals[order])
    assert sorted(totals.values())[1] - totals[best] > 1e-4, "a tie would leave the solvers a choice"
    assert set(map(tuple, targets(problem).values())) == {best}
    for plan in all_plans(problem).values():
        assert plan.certificate.primal == pytest.approx(totals[best] / 6, rel=1e-6)
        assert plan.certificate.relative_gap < 1e-6


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("n", [5, 60])
def test_a_permuted_set_costs_nothing(cost: CostName, n: int) -> None:
    x, order = cloud(n, 3), np.random.default_rng(1).permutation(n)
    problem = TransportProblem.between(x[order], x, cost=cost)
    assert all(found == order.tolist() for found in targets(problem).values())
    for plan in all_plans(problem).values():
        # The root of what float32 leaves of a square.
        assert plan.certificate.primal == pytest.approx(0, abs=2e-3 if cost == "euclidean" else 1e-5)


@pytest.mark.parametrize(("cost", "power"), [("squared-euclidean", 2), ("euclidean", 1)])
def test_a_translation_is_optimal(cost: CostName, power: int) -> None:
    x, shift = cloud(40, 2), np.array([3.0, -4.0])
    for name, plan in all_plans(TransportProblem.between(x, x + shift, cost=cost)).items():
        assert plan.certificate.primal == pytest.approx(5.0**power, rel=1e-5), name
        if cost == "squared-euclidean":
            assert plan.dense().argmax(1).tolist() == list(range(40)), name


def test_translating_one_set_adds_what_the_means_say() -> None:
    """W²(x + t, y) = W²(x, y) + 2 t·(mean x − mean y) + |t|² (Peyré & Cuturi 2019, remark 2.19)."""
    x, y, shift = cloud(30, 3), cloud(30, 3, seed=1), np.array([1.0, -2.0, 0.5], np.float32)
    before = all_plans(TransportProblem.between(x, y))
    after = all_plans(TransportProblem.between(x + shift, y))
    added = 2 * float(shift @ (x.mean(0) - y.mean(0))) + float(shift @ shift)
    for name, plan in before.items():
        assert after[name].certificate.primal == pytest.approx(plan.certificate.primal + added, rel=1e-5), name
        assert after[name].dense().argmax(1).tolist() == plan.dense().argmax(1).tolist(), name


def test_on_a_line_sorting_is_optimal() -> None:
    x, y = cloud(50, 1), 3 * cloud(50, 1, seed=1) ** 3
    ranks = x[:, 0].argsort().argsort()
    expected = y[:, 0].argsort()[ranks].tolist()
    assert all(found == expected for found in targets(TransportProblem.between(x, y)).values())
    between = float(np.abs(np.sort(x[:, 0]) - np.sort(y[:, 0])).mean())
    for plan in all_plans(TransportProblem.between(x, y, cost="euclidean")).values():
        assert plan.certificate.primal == pytest.approx(between, rel=1e-5)


def test_a_mean_bakery_splits_its_bread() -> None:
    """Kantorovich: a source of half the mass supplies two targets, and the cheapest route is not always optimal."""
    costs = np.array([[1.0, 2.0, 4.0], [3.0, 1.0, 1.0]])
    problem = TransportProblem.from_cost(costs, a=np.array([0.5, 0.5]), b=np.array([0.2, 0.5, 0.3]))
    for name, plan in all_plans(problem).items():
        np.testing.assert_allclose(plan.dense(), [[0.2, 0.3, 0.0], [0.0, 0.2, 0.3]], atol=1e-12, err_msg=name)
        assert plan.certificate.primal == pytest.approx(0.2 * 1 + 0.3 * 2 + 0.2 * 1 + 0.3 * 1)


def test_costs_may_be_negative() -> None:
    """All costs may be negative: the plan equals that of the same costs plus a constant."""
    costs = -np.array([[3.0, 2.0], [2.5, 4.0]])
    for weights in (None, np.array([0.25, 0.75])):
        for name, plan in all_plans(TransportProblem.from_cost(costs, a=weights, b=weights)).items():
            np.testing.assert_allclose(plan.dense(), np.diag([0.5, 0.5] if weights is None else weights), err_msg=name)
            assert plan.certificate.gap == pytest.approx(0, abs=1e-6), name
    for name, plan in all_plans(TransportProblem.from_cost(np.array([[-2.0]]))).items():
        assert plan.certificate.primal == pytest.approx(-2.0, rel=1e-14), name


def test_from_one_point_mass_goes_to_all_by_their_weights() -> None:
    y, b = cloud(7, 2), np.arange(1.0, 8.0)
    problem = TransportProblem.between(np.zeros((1, 2)), y, b=b)
    for name, plan in all_plans(problem).items():
        np.testing.assert_allclose(plan.dense(), (b / b.sum())[None], atol=1e-12, err_msg=name)
        assert plan.certificate.primal == pytest.approx(float((b / b.sum()) @ (y**2).sum(1)), rel=1e-5)


def test_uniform_sets_of_different_sizes() -> None:
    problem = TransportProblem.between(np.array([[0.0], [1.0]]), np.array([[0.0], [0.5], [1.0]]))
    for name, plan in all_plans(problem).items():
        np.testing.assert_allclose(plan.dense(), np.array([[2, 1, 0], [0, 1, 2]]) / 6, atol=1e-12, err_msg=name)
        assert plan.certificate.primal == pytest.approx(2 / 6 * 0.25)


def test_points_without_mass_are_passed_by() -> None:
    x, y = cloud(5, 2), cloud(4, 2, seed=1)
    a, b = np.array([0.0, 2.0, 1.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0, 2.0])
    inner = TransportProblem.between(x[[1, 2, 4]], y[[0, 2, 3]], a=a[[1, 2, 4]], b=b[[0, 2, 3]])
    expected = solve(inner).certificate.primal
    for name, plan in all_plans(TransportProblem.between(x, y, a=a, b=b)).items():
        dense = plan.dense()
        assert plan.certificate.primal == pytest.approx(expected, rel=1e-5), name
        assert dense[[0, 3]].sum() == dense[:, 1].sum() == 0, name
        assert plan.f is not None
        assert plan.g is not None
        assert np.isfinite(plan.f).all(), name
        assert np.isfinite(plan.g).all(), name


def test_orthogonal_directions_are_one_apart() -> None:
    """The cosine cost does not depend on lengths."""
    x = np.array([[2.0, 0.0], [0.0, 5.0]])
    y = np.array([[-1.0, 0.0], [0.0, -9.0]])
    for name, plan in all_plans(TransportProblem.between(x, y, cost="cosine")).items():
        assert plan.certificate.primal == pytest.approx(1, abs=1e-6), name
        assert plan.dense().argmax(1).tolist() == [1, 0], name
