"""Correct plans and valid certificates for numbers that are difficult in float32 or in naive float64."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist

from pipelines.errors import ProblemError
from pipelines.transport import semidiscrete
from pipelines.transport.exact_bounds import Entries, exact_bounds
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from pipelines.transport.solvers import barycentre, gromov, one_dimensional, partial, sinkhorn, sliced
from pipelines.transport.verify import verify


def proven(problem: TransportProblem, plan: TransportPlan, optimum: float, rel: float = 1e-9) -> None:
    """Check that the certificate encloses the optimum tightly and passes verification."""
    for certificate in (plan.certificate, verify(problem, plan)):
        slack = 1e-12 * abs(optimum)
        assert certificate.dual <= optimum + slack
        assert certificate.primal >= optimum - slack
        assert certificate.gap <= rel * max(abs(optimum), 1e-300)


def optimum_of(costs: np.ndarray, a: np.ndarray | None = None, b: np.ndarray | None = None) -> float:
    """Compute the optimum by SciPy: assignment, or the linear programme."""
    n, m = costs.shape
    if a is None or b is None:
        rows, columns = linear_sum_assignment(costs)
        return float(costs[rows, columns].mean())
    equal = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    return float(linprog(costs.ravel(), A_eq=equal, b_eq=np.concatenate([a, b]), method="highs").fun)


@pytest.mark.parametrize("offset", [0.0, 1e6, 1e7, 1e8, 1.7e9, 1e12])
def test_points_far_from_the_origin(offset: float) -> None:
    x = offset + np.array([[0.0], [10.0], [20.0], [30.0]])
    y = offset + np.array([[31.0], [21.0], [11.0], [1.0]])
    problem = TransportProblem.between(x, y)
    plan = solve(problem)
    assert plan.dense().argmax(1).tolist() == [3, 2, 1, 0]
    proven(problem, plan, 1.0)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8, -1e8])
def test_costs_with_a_large_constant(offset: float) -> None:
    costs = np.array([[3.0, 1, 2], [1, 3, 2], [2, 2, 0]])
    a, b = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    problem = TransportProblem.from_cost(costs + offset, a=a, b=b)
    plan = solve(problem)
    assert float((plan.dense() * costs).sum()) == pytest.approx(0.9, rel=1e-12)
    proven(problem, plan, 0.9 + offset)


def test_costs_that_stand_for_never() -> None:
    costs = np.random.default_rng(0).random((5, 5)) * 10
    costs[3], costs[:, 3] = 1e16, 1e16
    costs[3, 3] = 5
    a = np.array([0.125, 0.125, 0.125, 0.125, 0.5])
    problem = TransportProblem.from_cost(costs, a=a, b=a)
    plan = solve(problem)
    allowed = costs.copy()
    allowed[allowed == 1e16] = 100
    proven(problem, plan, optimum_of(allowed, a, a))
    assert plan.certificate.primal == pytest.approx(4.192, abs=1e-3)


@pytest.mark.parametrize("n", [8, 40, 63, 200])
def test_clusters_far_apart(n: int) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, n, 784))
    x[: n // 2] += 1e4
    y[n // 2 :] += 1e4
    problem = TransportProblem.between(x, y)
    proven(problem, solve(problem), optimum_of(cdist(x, y, "sqeuclidean")))


def ring(n: int) -> np.ndarray:
    angles = 2 * math.pi * np.arange(n) / n
    return np.stack([np.cos(angles), np.sin(angles)], 1)


CLOUDS = {
    "ring": lambda rng, n: (ring(n), 1.001 * ring(n) + 1e-3),
    "clusters": lambda rng, n: tuple(
        rng.standard_normal((n, 3)) * 1e-3 + 1e3 * rng.integers(0, 2, (n, 1)) for _ in range(2)
    ),
    "line": lambda rng, n: tuple(rng.standard_normal((n, 1)) * np.ones(5) for _ in range(2)),
    "near duplicates": lambda rng, n: (
        base := rng.standard_normal((n, 20)),
        base + 1e-7 * rng.standard_normal((n, 20)),
    ),
    "heavy tails": lambda rng, n: tuple(rng.standard_cauchy((n, 4)) for _ in range(2)),
}


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(
    ("cost", "power", "metric"),
    [("euclidean", 2.0, "euclidean"), ("power", 3.0, None), ("power", 0.5, None), ("squared-euclidean", 2.0, None)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_cost_on_awkward_clouds(cloud: str, cost: str, power: float, metric: str | None, weighted: bool) -> None:
    x, y = CLOUDS[cloud](np.random.default_rng(3), 40)
    a, b = (np.random.default_rng(4).random((2, 40)) + 0.1) if weighted else (None, None)
    if weighted:
        a, b = a / a.sum(), b / b.sum()
    problem = TransportProblem.between(x, y, a=a, b=b, cost=cost, power=power)
    distances = cdist(x, y)
    costs = distances if metric else distances**power
    plan = solve(problem)
    rows, columns, mass = plan.entries()
    mine, best = float(mass @ costs[rows, columns]), optimum_of(costs, a, b)
    assert mine <= best * (1 + 1e-6)  # SciPy's own tolerance
    proven(problem, plan, min(mine, best), rel=1e-7)


@pytest.mark.parametrize("apart", [1e-3, 1e-6, 1e-9, 0.0])
def test_cosines_of_near_duplicates(apart: float) -> None:
    """Compares with rational arithmetic, where 1 − cos² = (|x|²|y|² − ⟨x, y⟩²) / (|x|²|y|²) is exact."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((7, 3))
    y = x[rng.permutation(7)] + apart * rng.standard_normal((7, 3))

    def cosine(u: np.ndarray, v: np.ndarray) -> float:
        u_, v_ = ([Fraction(float(t)) for t in side] for side in (u, v))
        uu, vv, uv = (sum(p * q for p, q in zip(*pair, strict=True)) for pair in ((u_, u_), (v_, v_), (u_, v_)))
        squared = float((uu * vv - uv * uv) / (uu * vv))
        return squared / (1 + math.sqrt(max(1 - squared, 0))) if uv > 0 else 1 + math.sqrt(max(1 - squared, 0))

    costs = np.array([[cosine(u, v) for v in y] for u in x])
    problem = TransportProblem.between(x, y, cost="cosine")
    plan = solve(problem)
    best = optimum_of(costs)
    found = verify(problem, plan)
    assert plan.certificate.dual <= best * (1 + 1e-12) + 1e-33
    assert plan.certificate.primal >= best * (1 - 1e-12)
    # Directions are known to the roundoff of float64, and so are the costs between them.
    assert found.gap <= 1e-7 * best + 4e-15 * math.sqrt(best) + 1e-29


@pytest.mark.parametrize("scale", [1e-100, 1e-25, 1e-20, 1e-6, 1.0, 1e18, 1e60])
@pytest.mark.parametrize(("n", "weighted"), [(20, True), (32, False), (80, False)])
@pytest.mark.parametrize("share", [0.0, 0.01])
def test_the_unit_is_no_difficulty(scale: float, n: int, weighted: bool, share: float) -> None:
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((2, n, 3))
    a, b = (rng.random((2, n)) + 0.1) if weighted else (None, None)
    if weighted:
        a, b = a / a.sum(), b / b.sum()

    def solved(unit: float) -> TransportPlan:
        problem = TransportProblem.between(x * unit, y * unit, a=a, b=b, epsilon=6 * share * unit**2)
        plan = solve(problem)
        verify(problem, plan)
        return plan

    plan, plain = solved(scale), solved(1.0)
    # A unit that is no power of two rounds differently; then Sinkhorn's plans differ within their tolerance.
    assert np.abs(plan.dense() - plain.dense()).sum() <= (1e-2 if share else 1e-12)
    primal = plan.certificate.primal / scale / scale
    assert primal == pytest.approx(plain.certificate.primal, rel=1e-3 if share else 1e-9)


def test_two_points_that_nearly_coincide() -> None:
    rng = np.random.default_rng(7)
    x = 1 + 1e-9 * rng.standard_normal((2, 784))
    y = x[::-1] + 1e-12 * rng.standard_normal((2, 784))
    problem = TransportProblem.between(x, y)
    plan = solve(problem)
    proven(problem, plan, optimum_of(cdist(x, y, "sqeuclidean")), rel=1e-7)


def test_denormal_points() -> None:
    x, y = np.array([[0.0], [3e-320]]), np.array([[4e-320], [1e-320]])
    with pytest.raises(ProblemError, match="leave float64's range"):
        TransportProblem.between(x, y)
    problem = TransportProblem.between(x.astype(np.float32) + np.float32(1e-44), np.full((2, 1), 3e-44, np.float32))
    plan = solve(problem)
    verify(problem, plan)
    tiny = np.array([[0.0], [1.4e-45], [4.2e-45]], np.float32)
    problem = TransportProblem.between(tiny, tiny[::-1].copy())
    plan = solve(problem)
    assert plan.dense().argmax(1).tolist() == [2, 1, 0]
    assert plan.certificate.dual <= 0 <= plan.certificate.primal <= 1e-90


def test_rows_of_different_lengths() -> None:
    with pytest.raises(ProblemError, match="x: rows of different lengths"):
        TransportProblem.between([[1.0, 2.0], [3.0]], [[1.0, 2.0]])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01])
def test_an_infinite_cost_forbids_a_pair(weighted: bool, share: float) -> None:
    rng = np.random.default_rng(8)
    n = 30
    costs = rng.random((n, n))
    costs[rng.random((n, n)) < 0.5] = math.inf
    a, b = (rng.random((2, n)) + 0.5) if weighted else (None, None)
    if weighted:
        a, b = a / a.sum(), b / b.sum()
    problem = TransportProblem.from_cost(costs, a=a, b=b, epsilon=share)
    plan = solve(problem)
    dense = plan.dense()
    assert (dense[np.isinf(costs)] == 0).all()
    verify(problem, plan)
    if not share:
        proven(problem, plan, optimum_of(np.where(np.isinf(costs), 1e3, costs), a, b), rel=1e-7)


def test_a_plan_that_pays_an_infinite_cost_is_not_optimal() -> None:
    problem = TransportProblem.from_cost(np.array([[math.inf, 1.0], [1.0, math.inf]]))
    diagonal = np.arange(2)
    bounds = exact_bounds(problem, Entries(diagonal, diagonal, np.full(2, 0.5), permutation=True), None)
    assert bounds.primal == math.inf
    assert not bounds.closed


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_forbidden_pairs_that_leave_no_plan(share: float) -> None:
    costs = np.ones((4, 4))
    costs[:2, 1:] = math.inf  # two sources share one target
    for weights in (None, np.array([0.25, 0.25, 0.2, 0.3])):
        with pytest.raises(ProblemError, match="infeasible"):
            solve(TransportProblem.from_cost(costs, a=weights, b=weights, epsilon=share))


def test_a_partial_plan_of_negative_costs() -> None:
    problem = TransportProblem.from_cost(np.array([[-10.0, -7.0], [-6.0, -9.0]]))
    plan = partial.solve(problem, mass=0.5)
    assert plan.entries()[2].sum() == pytest.approx(0.5, abs=1e-12)
    assert plan.certificate.primal == pytest.approx(-5, rel=1e-12)
    assert verify(problem, plan, mass=0.5).dual == pytest.approx(-5, rel=1e-12)


def marginal_error(problem: TransportProblem, plan: TransportPlan) -> float:
    dense = plan.dense()
    a, b = problem.source_weights(), problem.target_weights()
    return float(np.abs(dense.sum(1) - a).sum() + np.abs(dense.sum(0) - b).sum())


@pytest.mark.parametrize(("n", "m", "d", "share", "shift"), [(150, 120, 10, 1e-4, 0.0), (101, 101, 2, 1e-3, 30.0)])
def test_the_entropic_plan_that_is_certified_is_handed_out(n: int, m: int, d: int, share: float, shift: float) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    y[1::2] += shift
    epsilon = share * float(cdist(x, y, "sqeuclidean").mean())
    problem = TransportProblem.between(x, y, epsilon=epsilon)
    plan = sinkhorn.solve(problem, tolerance=1e-6, max_iterations=100_000)
    assert plan.certificate.marginal_error <= 1e-6
    assert marginal_error(problem, plan) <= plan.certificate.marginal_error + 1e-14
    verify(problem, plan)


def test_points_without_weight_cost_nothing() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 60, 2))
    a, b = rng.random((2, 60))
    a[rng.random(60) < 0.2], b[rng.random(60) < 0.2] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    epsilon = 1e-4 * float(cdist(x, y, "sqeuclidean").mean())
    whole = TransportProblem.between(x, y, a=a, b=b, epsilon=epsilon)
    part = TransportProblem.between(x[a > 0], y[b > 0], a=a[a > 0], b=b[b > 0], epsilon=epsilon)
    plan, inner = solve(whole), solve(part)
    assert plan.certificate.iterations == inner.certificate.iterations
    np.testing.assert_allclose(plan.dense()[a > 0][:, b > 0], inner.dense(), atol=1e-12)
    assert plan.dense()[a == 0].sum() == plan.dense()[:, b == 0].sum() == 0
    verify(whole, plan)


def test_equal_points_whose_mean_is_not_theirs() -> None:
    x = np.full((65, 1), -1e41)
    problem = TransportProblem.between(x, x, epsilon=0.003)
    plan = solve(problem)
    np.testing.assert_allclose(plan.dense(), 1 / 65**2, rtol=1e-3)
    with pytest.raises(ProblemError, match="epsilon: negligible next to the costs, which is too small"):
        solve(TransportProblem.between(x, x / 2, epsilon=0.003))


def test_points_without_weight_do_not_change_what_is_handed_out() -> None:
    """Without these points, costs of nearly coincident points have another centre and are more precise."""
    near = np.random.default_rng(3).standard_normal((2, 17))
    x = near + 1e-4 * np.random.default_rng(4).standard_normal((2, 17))
    y = np.stack([near[1], 1e3 + near[0]])
    weights = {"a": np.array([2.0, 1.0]) / 3, "b": np.array([1.0, 0.0])}
    problem = TransportProblem.between(x, y, cost="euclidean", epsilon=0.01, **weights)
    plan = solve(problem)
    assert marginal_error(problem, plan) <= plan.certificate.marginal_error + 1e-15


FAR = 2.0**30
"""A number near which float32 has steps of 64, while float64 represents 16 bits after the binary point."""


def sixteen_bits(array: np.ndarray) -> np.ndarray:
    return np.round(array * 2**16) / 2**16


def test_other_solvers_far_from_the_origin() -> None:
    rng = np.random.default_rng(9)
    x, y = sixteen_bits(rng.standard_normal((30, 3))), sixteen_bits(rng.standard_normal((24, 3)))
    for found, near in (
        (sliced.solve(TransportProblem.between(x + FAR, y + FAR)), sliced.solve(TransportProblem.between(x, y))),
        (
            one_dimensional.solve(TransportProblem.between(x[:, :1] + FAR, y[:, :1] + FAR)),
            one_dimensional.solve(TransportProblem.between(x[:, :1], y[:, :1])),
        ),
        (
            partial.solve(TransportProblem.between(x + FAR, y + FAR), mass=0.5),
            partial.solve(TransportProblem.between(x, y), mass=0.5),
        ),
        (gromov.solve(x + FAR, y + FAR), gromov.solve(x, y)),
    ):
        assert found.certificate.primal == pytest.approx(near.certificate.primal, rel=1e-9)
        assert found.certificate.dual == pytest.approx(near.certificate.dual, rel=1e-9)


def test_a_barycentre_far_from_the_origin() -> None:
    rng = np.random.default_rng(10)
    sets = [sixteen_bits(rng.standard_normal((12, 2))) for _ in range(2)]
    near, found = (barycentre.solve([cloud + shift for cloud in sets], size=12) for shift in (0.0, FAR))
    assert found.objective == pytest.approx(near.objective, rel=1e-6)
    np.testing.assert_allclose(found.points - FAR, near.points, atol=1e-6)


def test_a_semidiscrete_map_far_from_the_origin() -> None:
    y = torch.as_tensor(sixteen_bits(np.random.default_rng(11).standard_normal((16, 2))))

    def sampler(shift: float) -> semidiscrete.Sampler:
        def drawn(count: int, draw: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(draw)
            return (torch.randn(count, 2, generator=generator, dtype=torch.float64) * 2**16).round() / 2**16 + shift

        return drawn

    options = {"steps": 400, "batch": 128, "check": 4096}
    near, found = (semidiscrete.solve(sampler(shift), y + shift, **options) for shift in (0.0, FAR))
    assert found.certificate.primal == pytest.approx(near.certificate.primal, rel=1e-3)
    samples = sampler(0.0)(500, 10**6)
    assert float((found.assign(samples + FAR) == near.assign(samples)).double().mean()) > 0.98


def test_sliced_bounds_are_bounds_where_they_meet() -> None:
    """On a line, the sliced plan is optimal and both bounds equal its cost; rounding must not reverse their order."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        direction = rng.standard_normal(5)
        x, y = (rng.standard_normal((9, 1)) * direction for _ in range(2))
        certificate = sliced.solve(TransportProblem.between(x, y), directions=4).certificate
        best = optimum_of(cdist(x, y, "sqeuclidean"))
        assert certificate.dual <= best * (1 + 1e-13)
        assert certificate.primal >= best * (1 - 1e-13)
