"""Laws of entropic plans on problems whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from pipelines.transport.solvers import sinkhorn

few = settings(max_examples=8)
seeds = st.integers(0, 2**31)


def clouds(seed: int, n: int = 24, m: int = 17, d: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0.1, 1, n), rng.uniform(0.1, 1, m)
    return rng.standard_normal((n, d)), rng.standard_normal((m, d)) + 1, a / a.sum(), b / b.sum()


@few
@given(seeds, st.sampled_from(["squared-euclidean", "euclidean", "cosine", "power"]), st.sampled_from([0.05, 0.3, 3.0]))
def test_marginals_and_bounds(seed, cost, epsilon):
    x, y, a, b = clouds(seed)
    problem = TransportProblem.between(x, y, a=a, b=b, cost=cost, epsilon=epsilon, power=1.5)
    for streaming in (False, True):
        plan = sinkhorn.solve(problem, streaming=streaming)
        dense = plan.dense()
        error = np.abs(dense.sum(1) - a).sum() + np.abs(dense.sum(0) - b).sum()
        assert error == pytest.approx(plan.certificate.marginal_error, abs=2e-5)
        assert error <= sinkhorn.TOLERANCE * 1.02
        assert plan.certificate.gap >= -1e-6 * abs(plan.certificate.primal)


@few
@given(seeds)
def test_bounds_hold_the_optimum_of_a_much_finer_solve(seed):
    x, y, a, b = clouds(seed)
    problem = TransportProblem.between(x, y, a=a, b=b, epsilon=0.2)
    rough, fine = sinkhorn.solve(problem, tolerance=0.05), sinkhorn.solve(problem, tolerance=1e-5)
    assert rough.certificate.dual <= fine.certificate.primal + 1e-5
    assert rough.certificate.primal >= fine.certificate.dual - 1e-5


@few
@given(seeds)
def test_the_reverse_problem_has_the_transposed_plan(seed):
    x, y, a, b = clouds(seed)
    there = sinkhorn.solve(TransportProblem.between(x, y, a=a, b=b, epsilon=0.3), tolerance=1e-5).dense()
    back = sinkhorn.solve(TransportProblem.between(y, x, a=b, b=a, epsilon=0.3), tolerance=1e-5).dense()
    assert np.abs(there - back.T).sum() < 1e-4


@few
@given(seeds, st.sampled_from([0.01, 7.0, 1e4]))
def test_costs_and_epsilon_scale_together(seed, factor):
    x, y, a, b = clouds(seed)
    costs = ((x[:, None] - y) ** 2).sum(2)
    one = sinkhorn.solve(TransportProblem.from_cost(costs, a=a, b=b, epsilon=0.3), tolerance=1e-5)
    other = sinkhorn.solve(TransportProblem.from_cost(factor * costs, a=a, b=b, epsilon=factor * 0.3), tolerance=1e-5)
    assert np.abs(one.dense() - other.dense()).sum() < 1e-4
    assert other.certificate.primal == pytest.approx(factor * one.certificate.primal, rel=1e-4)


@few
@given(seeds, st.floats(-1000, 1000))
def test_a_common_translation_changes_nothing(seed, shift):
    x, y, a, b = clouds(seed)
    # Numbers that float32 holds exactly, shifted or not.
    x, y, shift = np.round(x * 64) / 64, np.round(y * 64) / 64, np.round(shift)
    here = sinkhorn.solve(TransportProblem.between(x, y, a=a, b=b, epsilon=0.3), tolerance=1e-5)
    there = sinkhorn.solve(TransportProblem.between(x + shift, y + shift, a=a, b=b, epsilon=0.3), tolerance=1e-5)
    assert np.abs(here.dense() - there.dense()).sum() < 2e-3


@few
@given(seeds)
def test_a_point_may_be_split_in_two(seed):
    x, y, a, b = clouds(seed)
    halves = np.concatenate([a[:1] / 2, a[:1] / 2, a[1:]])
    whole = sinkhorn.solve(TransportProblem.between(x, y, a=a, b=b, epsilon=0.3), tolerance=1e-5)
    split = sinkhorn.solve(
        TransportProblem.between(np.concatenate([x[:1], x]), y, a=halves, b=b, epsilon=0.3), tolerance=1e-5
    )
    merged = split.dense()
    merged = np.concatenate([merged[:1] + merged[1:2], merged[2:]])
    assert np.abs(whole.dense() - merged).sum() < 1e-4


@few
@given(seeds)
def test_small_epsilon_approaches_the_network_simplex(seed):
    x, y, a, b = clouds(seed)
    exact = solve(TransportProblem.between(x, y, a=a, b=b)).certificate.primal
    entropic = sinkhorn.solve(TransportProblem.between(x, y, a=a, b=b, epsilon=0.02), tolerance=1e-4)
    costs = ((x[:, None] - y) ** 2).sum(2)
    # KL(P | a bᵀ) is at most the entropy of either side.
    assert exact - 1e-3 <= (entropic.dense() * costs).sum() <= exact + 0.02 * np.log(24) + 0.01


@few
@given(seeds, st.integers(1, 5))
def test_a_dirac_sends_everything(seed, d):
    x, y, _, b = clouds(seed, d=d)
    plan = sinkhorn.solve(TransportProblem.between(x[:1], y, b=b, epsilon=0.1))
    assert np.allclose(plan.dense()[0], b, atol=1e-5)
    assert plan.certificate.primal == pytest.approx(b @ ((x[0] - y) ** 2).sum(1), rel=1e-4)


def test_gaussians_in_closed_form():
    """Janati, Muzellec, Peyré & Cuturi (2020), theorem 1, in one dimension, by quantiles of fine grids."""
    s, t, shift, epsilon = 1.0, 0.6, 0.8, 0.5
    grid = torch.linspace(-5.5, 5.5, 600, dtype=torch.float64)

    def weights(mean: float, deviation: float) -> torch.Tensor:
        w = torch.exp(-(((grid - mean) / deviation) ** 2) / 2)
        return w / w.sum()

    problem = TransportProblem.between(
        grid[:, None], grid[:, None], a=weights(0, s), b=weights(shift, t), epsilon=epsilon
    )
    # With epsilon = 2 sigma², D = √(4 s² t² + sigma⁴) in the paper's scaling.
    sigma2 = epsilon / 2
    root = np.sqrt(4 * s**2 * t**2 + sigma2**2)
    expected = shift**2 + s**2 + t**2 - root + sigma2 * (1 - np.log(2 * sigma2) + np.log(root + sigma2))
    found = sinkhorn.solve(problem, tolerance=1e-5).certificate
    assert found.dual == pytest.approx(expected, rel=1e-3)
    assert found.primal == pytest.approx(expected, rel=1e-3)


@few
@given(seeds, st.floats(0.1, 10))
def test_unbalanced_bounds_meet(seed, penalty):
    x, y, a, b = clouds(seed)
    problem = TransportProblem.between(x, y, a=a, b=2 * b, epsilon=0.3, marginal_penalty=penalty)
    certificate = sinkhorn.solve(problem, tolerance=1e-4).certificate
    assert -1e-6 <= certificate.relative_gap <= 1e-4


@few
@given(seeds)
def test_points_without_weight_change_nothing(seed):
    x, y, a, b = clouds(seed)
    a[3] = b[5] = 0
    a, b = a / a.sum(), b / b.sum()
    with_them = sinkhorn.solve(TransportProblem.between(x, y, a=a, b=b, epsilon=0.3), tolerance=1e-5)
    keep_x, keep_y = np.arange(len(a)) != 3, np.arange(len(b)) != 5
    without = sinkhorn.solve(
        TransportProblem.between(x[keep_x], y[keep_y], a=a[keep_x], b=b[keep_y], epsilon=0.3), tolerance=1e-5
    )
    dense = with_them.dense()
    assert dense[3].sum() == 0
    assert dense[:, 5].sum() == 0
    assert np.abs(dense[keep_x][:, keep_y] - without.dense()).sum() < 1e-4
