"""Each build of the exact solver compared with SciPy and with all permutations, on difficult random data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from pipelines.transport import native
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import exact

METRICS = {"squared-euclidean": "sqeuclidean", "euclidean": "euclidean"}


@st.composite
def clouds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw two clouds, (n, d): lattices with tied costs, repeated points, distant clusters, any scale and offset."""
    n, d = draw(st.integers(1, 48)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x, y = rng.standard_normal((2, n, d))
    match draw(st.sampled_from(("gaussian", "lattice", "repeated", "clusters", "line"))):
        case "lattice":
            x, y = np.round(x), np.round(y)
        case "repeated":
            x, y = x[rng.integers(0, max(1, n // 4), n)], y[rng.integers(0, max(1, n // 4), n)]
        case "clusters":
            x, y = (side + 1000 * rng.integers(0, 3, (n, 1)) for side in (x, y))
        case "line":
            x, y = (np.outer(rng.standard_normal(n), np.ones(d)) for _ in range(2))
    scale, offset = 10.0 ** draw(st.integers(-12, 12)), draw(st.sampled_from((0.0, 1.0, 100.0)))
    return ((x + offset) * scale).astype(np.float32), ((y + offset) * scale).astype(np.float32)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Draw cost matrices, (n, n): few levels, heavy tails, many values near 0, negative values."""
    n = draw(st.integers(1, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    match draw(st.sampled_from(("uniform", "levels", "heavy", "crowded", "rank one"))):
        case "uniform":
            costs = rng.uniform(-1, 1, (n, n))
        case "levels":
            costs = rng.integers(0, draw(st.sampled_from((2, 5, 50, 1000))), (n, n))
        case "heavy":
            costs = 1 / (1e-6 + rng.random((n, n)))
        case "crowded":
            costs = rng.random((n, n)) ** 6
        case _:
            costs = np.outer(rng.standard_normal(n), rng.standard_normal(n))
    return costs.astype(np.float32)


def optimum(costs: np.ndarray) -> float:
    """Compute the minimum mean cost of a permutation: by brute force for n ≤ 6, else by SciPy."""
    n = len(costs)
    if n <= 6:
        return min(costs[np.arange(n), list(order)].mean() for order in itertools.permutations(range(n)))
    return float(costs[linear_sum_assignment(costs)].mean())


def assert_optimal(problem: TransportProblem, costs: np.ndarray, level: str, digits: float) -> None:
    """Check that the plan has the optimal cost, and that its potentials prove it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONGE_SIMD", level)
        plan = exact.solve(problem)
    n = len(costs)
    assert plan.assignment is not None
    assert plan.f is not None
    assert plan.g is not None
    tolerance = digits * max(float(np.abs(costs).max()), 1e-300)
    np.testing.assert_array_equal(np.sort(plan.assignment), np.arange(n))
    assert abs(costs[np.arange(n), plan.assignment].mean() - optimum(costs)) <= tolerance
    assert (plan.f[:, None] + plan.g - costs).max() <= tolerance
    assert abs(plan.f.mean() + plan.g.mean() - optimum(costs)) <= tolerance
    assert abs(plan.certificate.gap) <= tolerance


@pytest.mark.parametrize("level", native.usable_levels())
@given(sides=clouds(), cost=st.sampled_from(tuple(METRICS)))
def test_points(level: str, sides: tuple[np.ndarray, np.ndarray], cost: str) -> None:
    x, y = sides
    problem = TransportProblem.between(x, y, cost=cost)  # type: ignore[arg-type]
    costs = cdist(x.astype(np.float64), y.astype(np.float64), METRICS[cost])
    # A common offset is 100 times the spread, its squares 10⁴ times; float64 has 16 digits.
    assert_optimal(problem, costs, level, 1e-10)


@pytest.mark.parametrize("level", [*native.usable_levels(), "off"])
@given(matrix=matrices())
def test_costs(level: str, matrix: np.ndarray) -> None:
    assert_optimal(TransportProblem.from_cost(matrix), matrix.astype(np.float64), level, 1e-6)
