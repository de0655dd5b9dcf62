from __future__ import annotations

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(("epsilon", "covered"), [(0.05, 0.92), (1000.0, 0.92)])
def test_targets_are_covered_evenly(epsilon, covered):
    """Independent draws from a uniform plan would cover 63%."""
    targets = draw_pairs(plan_of(epsilon), seed=0).targets
    assert len(set(targets.tolist())) >= covered * 200
    assert np.bincount(targets).max() <= 3


def test_pairs_follow_the_plan():
    """Over many draws each source meets its targets as often as its row says, but for the balance of columns."""
    plan = plan_of(0.5, n=20, m=20)
    counts = np.zeros((20, 20))
    for draw in range(400):
        pairs = draw_pairs(plan, seed=1, draw=draw)
        counts[pairs.sources, pairs.targets] += 1 / 400
    dense = plan.dense() * 20
    assert np.abs(counts - dense).sum(1).mean() < 0.4
    assert (counts[dense < 1e-6] < 0.05).all()


def test_rectangular_and_sparse_plans():
    pairs = draw_pairs(plan_of(0.0, n=30, m=90), seed=0)
    assert len(set(pairs.targets.tolist())) == 30
    pairs = draw_pairs(plan_of(0.0, n=90, m=30), seed=0)
    assert np.bincount(pairs.targets, minlength=30).tolist() == [3] * 30


def test_a_function_of_seed_and_draw():
    plan = plan_of(1.0)
    one, again, other = (draw_pairs(plan, seed, draw).targets for seed, draw in ((0, 0), (0, 0), (0, 1)))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_source_without_mass_has_no_target():
    problem = TransportProblem.between(np.eye(3), np.eye(3), a=np.array([0.0, 0.5, 0.5]), epsilon=0.5)
    with pytest.raises(ProblemError, match="source 0 carries no mass"):
        draw_pairs(solve(problem), seed=0)
