from __future__ import annotations

import resource

import numpy as np
import ot
import pytest
import torch

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from pipelines.transport.solvers import sinkhorn


@pytest.fixture
def weighted() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 1, 40), rng.uniform(0.1, 1, 50)
    return rng.standard_normal((40, 3)), rng.standard_normal((50, 3)) + 1, a / a.sum(), b / b.sum()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_plan_of_pot(weighted, streaming, epsilon):
    x, y, a, b = weighted
    problem = TransportProblem.between(x, y, a=a, b=b, epsilon=epsilon)
    theirs = ot.sinkhorn(a, b, ot.dist(x, y), epsilon, method="sinkhorn_log", stopThr=1e-12, numItermax=20000)
    assert np.abs(sinkhorn.solve(problem, tolerance=1e-5, streaming=streaming).dense() - theirs).sum() < 2e-4


@pytest.mark.parametrize("penalty", [0.5, 5.0])
def test_unbalanced_plan_of_pot(weighted, penalty):
    x, y, a, b = weighted
    problem = TransportProblem.between(x, y, a=a, b=2 * b, epsilon=0.3, marginal_penalty=penalty)
    theirs = ot.unbalanced.sinkhorn_unbalanced(
        a, 2 * b, ot.dist(x, y), 0.3, penalty, reg_type="kl", stopThr=1e-12, numItermax=50000
    )
    assert np.abs(sinkhorn.solve(problem, tolerance=1e-5).dense() - theirs).sum() < 5e-3 * theirs.sum()


def test_routing_says_why():
    x = torch.randn(30, 2)
    small = solve(TransportProblem.between(x, x + 1, epsilon=0.5)).certificate
    assert small.solver == "sinkhorn"
    assert "epsilon > 0" in small.reason
    large = torch.zeros(20000, 1).expand(20000, 2)
    name, reason = sinkhorn.choose_kernel(TransportProblem.between(large, large, epsilon=0.5))
    assert name == "sinkhorn-streaming"
    assert "over the 2048 that are kept" in reason


def test_exact_solvers_refuse_epsilon():
    with pytest.raises(ProblemError, match="epsilon"):
        solve(TransportProblem.between(np.eye(3), np.eye(4, 3), epsilon=0.1), "network-simplex")


def test_epsilon_too_small_is_refused():
    x = np.random.default_rng(0).standard_normal((20, 2))
    with pytest.raises(ProblemError, match="too small"):
        sinkhorn.solve(TransportProblem.between(x, x + 1, epsilon=1e-9))
    with pytest.raises(ProblemError, match="epsilon"):
        sinkhorn.solve(TransportProblem.between(x, x + 1))


def test_tolerance_too_small_is_refused():
    x = np.random.default_rng(0).standard_normal((20, 2))
    with pytest.raises(ProblemError, match="tolerance"):
        sinkhorn.solve(TransportProblem.between(x, x + 1, epsilon=0.1), tolerance=1e-9)


def test_too_few_sweeps_raise_and_give_no_plan():
    rng = np.random.default_rng(0)
    problem = TransportProblem.between(rng.standard_normal((50, 2)), rng.standard_normal((50, 2)), epsilon=0.01)
    with pytest.raises(NotConvergedError, match="sinkhorn stopped after"):
        sinkhorn.solve(problem, max_iterations=4)


def test_far_outliers_and_a_poor_start_do_not_underflow():
    """With costs of 10⁴ epsilon, kernel entries underflow in float32 for every scaling."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 2)), rng.standard_normal((30, 2))
    y[0] += 100
    problem = TransportProblem.between(x, y, epsilon=1.0)
    cold = sinkhorn.solve(problem)
    start = (np.zeros(30), rng.uniform(-5000, 5000, 30))
    warm = sinkhorn.solve(problem, start=start)
    assert np.isfinite(cold.dense()).all()
    assert warm.certificate.dual == pytest.approx(cold.certificate.dual, rel=1e-3)


def test_warm_start_saves_sweeps(weighted):
    x, y, a, b = weighted
    problem = TransportProblem.between(x, y, a=a, b=b, epsilon=0.05)
    cold = sinkhorn.solve(problem, tolerance=1e-4)
    moved = TransportProblem.between(x + 1e-4, y, a=a, b=b, epsilon=0.05)
    warm = sinkhorn.solve(moved, tolerance=1e-4, start=(cold.f, cold.g))
    assert warm.certificate.iterations < cold.certificate.iterations / 3
    with pytest.raises(ProblemError, match="start"):
        sinkhorn.solve(problem, start=(cold.f, cold.g[1:]))


@pytest.mark.parametrize("n", [1, 2])
def test_smallest_sizes_and_duplicates(n):
    plan = solve(TransportProblem.between(np.ones((n, 4)), np.ones((3, 4)), epsilon=0.1))
    assert np.allclose(plan.dense(), 1 / (3 * n))
    assert plan.certificate.primal == pytest.approx(0, abs=1e-6)


def test_rows_of_a_plan(weighted):
    x, y, a, b = weighted
    plan = sinkhorn.solve(TransportProblem.between(x, y, a=a, b=b, epsilon=0.2))
    dense = plan.dense()
    block = plan.block(10, 25)
    rebuilt = np.zeros((15, 50))
    rebuilt[block.rows, block.columns] = block.mass
    assert np.allclose(rebuilt.sum(1), dense[10:25].sum(1), rtol=1e-12)
    assert np.abs(rebuilt - dense[10:25]).sum() < 2e-6
    assert block.certificate is plan.certificate
    assert len(plan.block(7, 7).mass) == 0
    means = plan.gibbs().barycentric(torch.as_tensor(y))
    assert np.allclose(means.numpy(), dense @ y / dense.sum(1, keepdims=True), atol=1e-6)


def test_a_plan_without_its_points_says_so(weighted):
    x, y, a, b = weighted
    problem = TransportProblem.between(x, y, a=a, b=b, epsilon=0.2)
    plan = sinkhorn.solve(problem)
    sent = plan.without_points()
    with pytest.raises(ProblemError, match="is stored as potentials, without its problem"):
        sent.dense()
    with pytest.raises(ProblemError, match="has no sparse form"):
        plan.entries()
    assert np.array_equal(sent.between(problem).dense(), plan.dense())


@pytest.mark.slow
def test_streaming_needs_no_memory_for_the_matrix():
    """A kernel of 24,000 × 24,000 is 2.3 GB."""
    x = torch.randn(24000, 4, generator=torch.Generator().manual_seed(0))
    problem = TransportProblem.between(x, x.flip(0) + 0.5, epsilon=4.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = solve(problem)
    assert plan.certificate.solver == "sinkhorn-streaming"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_equal_inputs_give_equal_plans(weighted):
    x, y, a, b = weighted
    problem = TransportProblem.between(x, y, a=a, b=b, epsilon=0.2)
    plans: list[TransportPlan] = [sinkhorn.solve(problem) for _ in range(2)]
    assert np.array_equal(plans[0].g, plans[1].g)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_gpu_finds_the_same_plan(weighted, streaming):
    x, y, a, b = weighted
    here = sinkhorn.solve(TransportProblem.between(x, y, a=a, b=b, epsilon=0.2), tolerance=1e-5)
    points = (torch.as_tensor(side).cuda() for side in (x, y))
    there = sinkhorn.solve(
        TransportProblem.between(*points, a=a, b=b, epsilon=0.2), tolerance=1e-5, streaming=streaming
    )
    assert np.abs(here.dense() - there.dense()).sum() < 1e-4


@pytest.mark.parametrize("seed", [40, 220, 300, 1060, 1520])
def test_sets_far_apart_and_nearly_points(seed: int) -> None:
    """With float32 sums, rows can miss mass that no column misses, so there is no mass to distribute."""
    generator = torch.Generator().manual_seed(seed)
    pole = torch.nn.functional.normalize(torch.randn(1, 8, generator=generator), dim=1)
    x, y = (torch.nn.functional.normalize(pole + 0.01 * torch.randn(4, 8, generator=generator), dim=1) for _ in "xy")
    certificate = sinkhorn.solve(TransportProblem.between(x, y, cost="cosine", epsilon=0.05)).certificate
    assert 0 <= certificate.gap < 1e-6
