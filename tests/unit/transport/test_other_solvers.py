from __future__ import annotations

import numpy as np
import ot
import pytest
import torch

from pipelines.errors import NotConvergedError, ProblemError
from pipelines.transport import semidiscrete
from pipelines.transport.cost import matched_cost, pairwise_cost, with_conditions
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from pipelines.transport.solvers import barycentre, gromov, one_dimensional, partial, sliced

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((40, 3)), RNG.standard_normal((60, 3)) + 1
A, B = (w / w.sum() for w in (RNG.uniform(0.1, 1, 40), RNG.uniform(0.1, 1, 60)))


@pytest.mark.parametrize("cost", ["squared-euclidean", "euclidean", "power"])
@pytest.mark.parametrize("weights", [{}, {"a": A, "b": B}])
def test_on_the_line_the_network_simplex_finds_no_better(cost, weights):
    problem = TransportProblem.between(X[:, :1], Y[:, :1], cost=cost, power=3.0, **weights)
    plan, simplex = one_dimensional.solve(problem), solve(problem, "network-simplex")
    assert plan.certificate.primal == pytest.approx(simplex.certificate.primal, rel=1e-5)
    assert abs(plan.certificate.relative_gap) < 1e-9
    assert np.allclose(plan.dense().sum(0), problem.target_weights())


def test_the_line_refuses_the_plane_and_concave_costs():
    with pytest.raises(ProblemError, match="one coordinate"):
        one_dimensional.solve(TransportProblem.between(X, Y))
    with pytest.raises(ProblemError, match="convex"):
        one_dimensional.solve(TransportProblem.between(X[:, :1], Y[:, :1], cost="power", power=0.5))


def test_sliced_bounds_hold_the_optimum():
    problem = TransportProblem.between(X, Y, a=A, b=B)
    exact = solve(problem).certificate.primal
    certificate = sliced.solve(problem).certificate
    assert certificate.dual <= exact <= certificate.primal
    theirs = ot.sliced_wasserstein_distance(X, Y, A, B, n_projections=4000, seed=0) ** 2
    assert sliced.distance(problem, directions=2000) == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
def test_partial_cost_of_pot(mass):
    plan = partial.solve(TransportProblem.between(X, Y, a=A, b=B), mass=mass)
    costs = ot.dist(X, Y)
    theirs = float((ot.partial.partial_wasserstein(A, B, costs, m=mass) * costs).sum())
    dense = plan.dense()
    assert dense.sum() == pytest.approx(mass)
    assert (dense.sum(1) <= A + 1e-9).all()
    assert (dense * costs).sum() == pytest.approx(theirs, rel=1e-4)
    assert plan.certificate.primal == pytest.approx(theirs, rel=1e-4)
    with pytest.raises(ProblemError, match="mass"):
        partial.solve(TransportProblem.between(X, Y), mass=1.5)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_gromov_recovers_a_rotated_set(scale):
    """Distances alone identify the points among their rotated, translated and shuffled images."""
    rotation = np.linalg.qr(RNG.standard_normal((3, 3)))[0]
    x = scale * X[:12] * [1, 2, 4]
    order = np.random.default_rng(1).permutation(12)
    plan = gromov.solve(x, (x @ rotation + 5)[order])
    assert plan.certificate.dual == 0
    assert plan.certificate.primal == pytest.approx(0, abs=1e-4 * scale**2)
    assert np.abs(plan.dense() - np.eye(12)[:, order] / 12).max() < 1e-6


def test_gromov_between_other_dimensions_and_weights_is_the_distortion_of_its_plan():
    x, y = X[:9], Y[:7, :2]
    a, b = A[:9] / A[:9].sum(), B[:7] / B[:7].sum()
    plan = gromov.solve(x, y, a=a, b=b)
    dense = plan.dense()
    assert np.allclose(dense.sum(1), a)
    assert np.allclose(dense.sum(0), b)
    left, right = (ot.dist(side, side, "euclidean") for side in (x, y))
    distortion = np.einsum("ikjl,ij,kl", (left[:, :, None, None] - right) ** 2, dense, dense)
    assert plan.certificate.primal == pytest.approx(distortion, rel=1e-5)
    independent = np.einsum("ikjl,ij,kl", (left[:, :, None, None] - right) ** 2, *[np.outer(a, b)] * 2)
    assert plan.certificate.primal < 0.8 * independent


def test_barycentre_of_translates_is_between_them():
    found = barycentre.solve([X[:20] - 2, X[:20] + 2], size=20)
    assert found.objective == pytest.approx(12, rel=0.02)
    assert np.allclose(np.sort(found.points, 0), np.sort(X[:20], 0), atol=0.05)
    tilted = barycentre.solve([X[:20] - 2, X[:20] + 2], size=20, weights=[3.0, 1.0])
    assert np.allclose(tilted.points.mean(0), X[:20].mean(0) - 1, atol=0.05)
    with pytest.raises(ProblemError, match="weights"):
        barycentre.solve([X], size=4, weights=[1.0, 2.0])


def gaussian(count: int, draw: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(draw))


def test_semidiscrete_shares_are_even_and_its_cost_that_of_large_samples():
    found = semidiscrete.solve(gaussian, torch.as_tensor(Y[:24]), steps=1500, batch=256)
    samples = gaussian(2400, 10**6)
    shares = torch.bincount(found.assign(samples), minlength=24) / 2400
    assert float((shares - 1 / 24).abs().sum()) < 0.25
    exact = solve(TransportProblem.between(samples, Y[:24])).certificate.primal
    assert found.semidual == pytest.approx(exact, rel=0.05)
    assert found.certificate.primal == pytest.approx(exact, rel=0.1)


def test_semidiscrete_refuses_a_poor_map():
    with pytest.raises(NotConvergedError, match="marginal error"):
        semidiscrete.solve(gaussian, torch.as_tensor(Y[:24]), steps=2, batch=8)


@pytest.mark.parametrize("cost", ["squared-euclidean", "euclidean", "power", "cosine"])
def test_costs_by_hand(cost):
    x, y = torch.as_tensor(X), torch.as_tensor(Y)
    distances = np.linalg.norm(X[:, None] - Y, axis=2)
    cosines = (X @ Y.T) / np.outer(np.linalg.norm(X, axis=1), np.linalg.norm(Y, axis=1))
    by_hand = {
        "squared-euclidean": distances**2,
        "euclidean": distances,
        "power": distances**1.5,
        "cosine": 1 - cosines,
    }
    assert np.allclose(pairwise_cost(x, y, cost, 1.5), by_hand[cost])
    assert np.allclose(matched_cost(x, y[:40], cost, 1.5), np.diagonal(by_hand[cost]))
    exact = solve(TransportProblem.between(X, Y, cost=cost, power=1.5)).certificate.primal
    assert exact == pytest.approx(ot.emd2([], [], by_hand[cost]), rel=1e-4)


def test_conditions_keep_classes_apart():
    labels_x, labels_y = torch.arange(40) % 4, torch.arange(60) % 4
    x, y = torch.as_tensor(X), torch.as_tensor(Y)
    pointed = [with_conditions(p, labels, 4, weight=50.0) for p, labels in ((x, labels_x), (y, labels_y))]
    costs = pairwise_cost(*pointed, "squared-euclidean")
    assert torch.allclose(
        costs - pairwise_cost(x.float(), y.float(), "squared-euclidean"),
        50.0 * (labels_x[:, None] != labels_y),
        atol=1e-3,
    )
    rows, columns, mass = solve(TransportProblem.between(*pointed)).entries()
    # The simplex splits masses down to rounding.
    assert mass[labels_x[rows].numpy() != labels_y[columns].numpy()].sum() < 1e-9
    free = solve(TransportProblem.between(X, Y)).entries()
    assert not (labels_x[free[0]] == labels_y[free[1]]).all()
    with pytest.raises(ProblemError, match="labels"):
        with_conditions(x, labels_y, 4, 1.0)


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan")])
def test_powers_are_positive(power):
    with pytest.raises(ProblemError, match="power"):
        TransportProblem.between(X, Y, cost="power", power=power)
