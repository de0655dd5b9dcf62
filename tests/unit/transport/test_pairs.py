from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from pipelines.errors import ProblemError
from pipelines.transport.pairs import draw_pairs
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve


def plan_of(epsilon: float, n: int = 200, m: int = 200):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, 2)), rng.standard_normal((m, 2))
    return solve(TransportProblem.between(x, y, epsilon=epsilon))


def test_a_permutation_is_taken_as_it_is():
    plan = plan_of(0.0)
    pairs = draw_pairs(plan, seed=3)
    assert pairs.targets.tolist() == plan.assignment.tolist()
    assert pairs.sources.tolist() == list(range(200))


def test_a_uniform_plan_meets_each_target_once():
    """Independent draws would meet 63% of them."""
    targets = draw_pairs(plan_of(1e6), seed=0).targets
    assert len(set(targets.tolist())) >= 195
    assert np.bincount(targets).max() <= 2


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.5])
def test_each_pair_is_drawn_as_often_as_the_plan_says(epsilon):
    """Each frequency is within five standard deviations of its mass; the mean cost of a pair is that of the plan."""
    n, draws = 64, 3000
    rng = np.random.default_rng(0)
    problem = TransportProblem.between(rng.standard_normal((n, 2)), rng.standard_normal((n, 2)), epsilon=epsilon)
    plan = solve(problem)
    chances = plan.dense() * n
    counts = np.zeros((n, n))
    for draw in range(draws):
        pairs = draw_pairs(plan, seed=1, draw=draw)
        counts[pairs.sources, pairs.targets] += 1 / draws
    deviation = np.sqrt(chances * (1 - chances).clip(0) / draws)
    assert (np.abs(counts - chances) <= 5 * deviation + 2 / draws).all()
    costs = cdist(problem.x, problem.y, "sqeuclidean")
    # Independent draws for each source have this variance; strata do not increase it.
    spread = np.sqrt(((chances * costs**2).sum(1) - (chances * costs).sum(1) ** 2).clip(0).sum() / draws) / n
    assert abs((counts * costs).sum() / n - (chances * costs).sum() / n) <= 5 * spread + 1e-6


def test_rectangular_and_sparse_plans():
    pairs = draw_pairs(plan_of(0.0, n=30, m=90), seed=0)
    assert len(set(pairs.targets.tolist())) == 30
    pairs = draw_pairs(plan_of(0.0, n=90, m=30), seed=0)
    assert np.bincount(pairs.targets, minlength=30).tolist() == [3] * 30
    plan = plan_of(0.0, n=30, m=70)
    targets = draw_pairs(plan, seed=0).targets
    assert (plan.dense()[np.arange(30), targets] > 0).all()


def test_a_function_of_seed_and_draw():
    plan = plan_of(1.0)
    one, again, other = (draw_pairs(plan, seed, draw).targets for seed, draw in ((0, 0), (0, 0), (0, 1)))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_source_without_mass_has_no_target():
    problem = TransportProblem.between(np.eye(3), np.eye(3), a=np.array([0.0, 0.5, 0.5]), epsilon=0.5)
    with pytest.raises(ProblemError, match="source 0 carries no mass"):
        draw_pairs(solve(problem), seed=0)
