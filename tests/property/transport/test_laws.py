"""Laws of optimal plans, for every solver that supports a problem."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from solving import COSTS, all_plans, check_certificate, costs_between

from pipelines.spec import CostName
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve

settings.register_profile("plans", settings.get_profile("laws"), max_examples=40)
PLANS = settings.get_profile("plans")

seeds = st.integers(0, 2**32 - 1)
costs_named = st.sampled_from(COSTS)
EPSILON_32 = 2.0**-23


@dataclass
class Clouds:
    """Two sets of points, (n, d) and (m, d) float32."""

    x: np.ndarray
    y: np.ndarray

    def rounding(self, cost: CostName) -> float:
        """Bound the float32 error of a cost, relative to the largest square, including cancellation."""
        if cost == "cosine":
            return 16 * EPSILON_32 * (1 + self.x.shape[1])
        points = np.concatenate([self.x, self.y]).astype(np.float64)
        squares = 16 * EPSILON_32 * float(((points - points.mean(0)) ** 2).sum(1).max() + 1e-12)
        return squares if cost == "squared-euclidean" else float(np.sqrt(squares))


@st.composite
def clouds(draw: st.DrawFn, largest: int = 6, square: bool = True, d: int | None = None) -> Clouds:
    """Draw Gaussian points of any scale, or points of a small lattice with tied costs and repeated points."""
    n = draw(st.integers(1, largest))
    m = n if square else draw(st.integers(1, largest))
    d = d or draw(st.integers(1, 4))
    random = np.random.default_rng(draw(seeds))
    if draw(st.booleans()):
        scale = 10.0 ** draw(st.integers(-3, 3))
        x, y = (scale * (random.normal(size=(k, d)) + shift) for k, shift in ((n, 0), (m, 0.5)))
    else:
        x, y = (random.integers(0, 3, (k, d)) - 1 for k in (n, m))
    return Clouds(x.astype(np.float32), y.astype(np.float32))


@st.composite
def weights(draw: st.DrawFn, n: int) -> np.ndarray:
    """Draw weights with sum 1; some may be zero."""
    parts = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n).filter(any))
    return np.array(parts) / sum(parts)


@PLANS
@given(pair=clouds(), cost=costs_named)
def test_every_solver_finds_what_brute_force_finds(pair: Clouds, cost: CostName) -> None:
    plans = all_plans(TransportProblem.between(pair.x, pair.y, cost=cost))
    assert {"auto", "brute-force", "assignment", "network-simplex"} <= plans.keys()
    best = plans["brute-force"].certificate.primal
    costs = costs_between(pair.x, pair.y, cost)
    if not np.isnan(costs).any():
        assert abs(best - costs[linear_sum_assignment(costs)].mean()) <= pair.rounding(cost)
    for name, plan in plans.items():
        assert abs(plan.certificate.primal - best) <= pair.rounding(cost), name


@PLANS
@given(pair=clouds(largest=24), cost=st.sampled_from(COSTS[:2]))
def test_certificates_between_as_many_points(pair: Clouds, cost: CostName) -> None:
    n = len(pair.x)
    uniform = np.full(n, 1 / n)
    costs = costs_between(pair.x, pair.y, cost)
    for plan in all_plans(TransportProblem.between(pair.x, pair.y, cost=cost)).values():
        check_certificate(plan, uniform, uniform, costs, pair.rounding(cost))


@PLANS
@given(pair=clouds(largest=12, square=False), cost=st.sampled_from(COSTS[:2]), data=st.data())
def test_certificates_between_weighted_points(pair: Clouds, cost: CostName, data: st.DataObject) -> None:
    a, b = data.draw(weights(len(pair.x)), label="a"), data.draw(weights(len(pair.y)), label="b")
    costs = costs_between(pair.x, pair.y, cost)
    for plan in all_plans(TransportProblem.between(pair.x, pair.y, a=a, b=b, cost=cost)).values():
        check_certificate(plan, a, b, costs, pair.rounding(cost))


@PLANS
@given(n=st.integers(1, 6), m=st.integers(1, 6), seed=seeds, data=st.data())
def test_a_plan_of_any_cost_is_the_linear_programmes(n: int, m: int, seed: int, data: st.DataObject) -> None:
    """Includes negative costs, which do not occur between points."""
    costs = np.random.default_rng(seed).normal(size=(n, m)).astype(np.float32).astype(np.float64)
    a, b = data.draw(weights(n), label="a"), data.draw(weights(m), label="b")
    marginals = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    programme = linprog(costs.ravel(), A_eq=marginals, b_eq=np.concatenate([a, b]), bounds=(0, None))
    for plan in all_plans(TransportProblem.from_cost(costs, a=a, b=b)).values():
        check_certificate(plan, a, b, costs, 1e-6)
        assert abs(plan.certificate.primal - programme.fun) <= 1e-6


@PLANS
@given(pair=clouds(largest=10, square=False), cost=costs_named)
def test_the_distance_is_symmetric(pair: Clouds, cost: CostName) -> None:
    there = all_plans(TransportProblem.between(pair.x, pair.y, cost=cost))
    back = all_plans(TransportProblem.between(pair.y, pair.x, cost=cost))
    assert there.keys() == back.keys()
    for name, plan in there.items():
        assert abs(plan.certificate.primal - back[name].certificate.primal) <= 2 * pair.rounding(cost), name


@PLANS
@given(pair=clouds(largest=12), cost=costs_named, seed=seeds)
def test_the_order_of_points_does_not_matter(pair: Clouds, cost: CostName, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows, columns = random.permutation(len(pair.x)), random.permutation(len(pair.y))
    plans = all_plans(TransportProblem.between(pair.x, pair.y, cost=cost))
    shuffled = all_plans(TransportProblem.between(pair.x[rows], pair.y[columns], cost=cost))
    for name, plan in plans.items():
        assert abs(plan.certificate.primal - shuffled[name].certificate.primal) <= 2 * pair.rounding(cost), name


@PLANS
@given(pair=clouds(largest=12), power=st.integers(-6, 6))
def test_costs_scale_with_points(pair: Clouds, power: int) -> None:
    """Scales by powers of two, which are exact in float32, so the plan must not change."""
    scale = 2.0**power
    for cost, factor in (("euclidean", scale), ("squared-euclidean", scale**2), ("cosine", 1.0)):
        before = all_plans(TransportProblem.between(pair.x, pair.y, cost=cost))
        after = all_plans(TransportProblem.between(scale * pair.x, scale * pair.y, cost=cost))
        for name, plan in before.items():
            difference = abs(after[name].certificate.primal - factor * plan.certificate.primal)
            assert difference <= 2 * factor * pair.rounding(cost), name


@PLANS
@given(pair=clouds(largest=12), shift=st.floats(-100, 100, width=32))
def test_moving_both_sets_together_changes_nothing(pair: Clouds, shift: float) -> None:
    moved = Clouds(pair.x + np.float32(shift), pair.y + np.float32(shift))
    # Rounded to float32 where they are now, points are where they were up to this:
    spread = float(np.abs(np.concatenate([pair.x, pair.y])).max())
    jolt = EPSILON_32 * (abs(shift) + spread)
    for cost in COSTS[:2]:
        allowed = 4 * jolt * (1 if cost == "euclidean" else 4 * spread + jolt) * pair.x.shape[1] ** 0.5
        allowed += pair.rounding(cost) + moved.rounding(cost)
        after = all_plans(TransportProblem.between(moved.x, moved.y, cost=cost))
        for name, plan in all_plans(TransportProblem.between(pair.x, pair.y, cost=cost)).items():
            assert abs(plan.certificate.primal - after[name].certificate.primal) <= allowed, (name, cost)


@PLANS
@given(pair=clouds(largest=8), third=seeds)
def test_the_distance_obeys_the_triangle(pair: Clouds, third: int) -> None:
    z = np.random.default_rng(third).normal(size=pair.x.shape).astype(np.float32)

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return solve(TransportProblem.between(x, y, cost="euclidean")).certificate.primal

    slack = 3 * max(Clouds(*two).rounding("euclidean") for two in ((pair.x, z), (z, pair.y), (pair.x, pair.y)))
    assert distance(pair.x, pair.y) <= distance(pair.x, z) + distance(z, pair.y) + slack


@PLANS
@given(n=st.integers(1, 30), d=st.integers(1, 5), seed=seeds, cost=st.sampled_from(COSTS[:2]))
def test_a_shuffled_set_is_found_again(n: int, d: int, seed: int, cost: CostName) -> None:
    random = np.random.default_rng(seed)
    x, order = random.normal(size=(n, d)).astype(np.float32), random.permutation(n)
    x[:, 0] = random.permutation(2 * n)[:n]  # no two of them closer than costs in float32 can tell
    for name, plan in all_plans(TransportProblem.between(x, x[order], cost=cost)).items():
        rows, columns, _ = plan.entries()
        assert order[columns].tolist() == rows.tolist(), name


@PLANS
@given(n=st.integers(1, 30), d=st.integers(1, 5), seed=seeds)
def test_the_gradient_of_a_convex_function_is_an_optimal_map(n: int, d: int, seed: int) -> None:
    """Brenier's theorem for the quadratic cost, with a positive definite form and with a sum of exponentials."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, d))
    root = random.normal(size=(d, d))
    for y in (x @ (root @ root.T + 0.1 * np.eye(d)), np.exp(x) + x):
        cloud = Clouds(x.astype(np.float32), y.astype(np.float32))
        mapped = float(((cloud.x.astype(np.float64) - cloud.y) ** 2).sum(1).mean())
        for name, plan in all_plans(TransportProblem.between(cloud.x, cloud.y)).items():
            assert abs(plan.certificate.primal - mapped) <= cloud.rounding("squared-euclidean"), name


@PLANS
@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=seeds, data=st.data())
def test_on_a_line_mass_moves_in_order(n: int, m: int, seed: int, data: st.DataObject) -> None:
    """The quantiles of both sides are matched (Peyré & Cuturi 2019, section 2.6)."""
    random = np.random.default_rng(seed)
    x, y = (random.normal(size=(k, 1)).astype(np.float32) for k in (n, m))
    a, b = data.draw(weights(n), label="a"), data.draw(weights(m), label="b")
    by_x, by_y = np.argsort(x[:, 0]), np.argsort(y[:, 0])
    cuts = np.unique(np.concatenate([[0.0], np.cumsum(a[by_x]), np.cumsum(b[by_y])]).clip(0, 1))
    middles, lengths = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts)
    quantiles = [
        points[order, 0].astype(np.float64)[np.searchsorted(np.cumsum(mass[order]), middles).clip(max=len(mass) - 1)]
        for points, order, mass in ((x, by_x, a), (y, by_y, b))
    ]
    distance = np.abs(quantiles[0] - quantiles[1])
    for cost, expected in (("euclidean", lengths @ distance), ("squared-euclidean", lengths @ distance**2)):
        for name, plan in all_plans(TransportProblem.between(x, y, a=a, b=b, cost=cost)).items():
            assert abs(plan.certificate.primal - expected) <= Clouds(x, y).rounding(cost) + 1e-9, (name, cost)


def _cross(p: np.ndarray, q: np.ndarray, r: np.ndarray, s: np.ndarray) -> bool:
    """Whether the open segments pq and rs cross, without their ends."""

    def side(u: np.ndarray, v: np.ndarray, w: np.ndarray) -> float:
        return float(np.sign((v[0] - u[0]) * (w[1] - u[1]) - (v[1] - u[1]) * (w[0] - u[0])))

    return side(p, q, r) * side(p, q, s) < 0 and side(r, s, p) * side(r, s, q) < 0


@PLANS
@given(pair=clouds(largest=10, d=2))
def test_in_the_plane_shortest_ways_do_not_cross(pair: Clouds) -> None:
    """Monge's remark: uncrossing two paths makes them shorter. Ties between lattice points would hide it."""
    x, y = pair.x.astype(np.float64), pair.y.astype(np.float64)
    for name, plan in all_plans(TransportProblem.between(pair.x, pair.y, cost="euclidean")).items():
        rows, columns, _ = plan.entries()
        starts, ends = x[rows], y[columns]
        for i, j in itertools.combinations(range(len(rows)), 2):
            if _cross(starts[i], ends[i], starts[j], ends[j]):
                kept = np.linalg.norm(starts[i] - ends[i]) + np.linalg.norm(starts[j] - ends[j])
                swapped = np.linalg.norm(starts[i] - ends[j]) + np.linalg.norm(starts[j] - ends[i])
                assert kept - swapped <= 2 * pair.rounding("euclidean"), name
