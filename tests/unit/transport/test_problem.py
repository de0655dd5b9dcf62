"""Transport problems: validation and error messages."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from solving import all_plans

from pipelines.errors import ProblemError
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve

X, Y = np.arange(6.0).reshape(3, 2), np.ones((3, 2))


def but(value: float, array: np.ndarray = X) -> np.ndarray:
    """Return the array with one number replaced."""
    changed = array.copy()
    changed[-1, -1] = value
    return changed


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (but(math.nan), "x: 1 of 6 numbers are NaN or infinite"),
        (but(math.inf), "x: 1 of 6 numbers are NaN"),
        (but(-math.inf), "x: 1 of 6 numbers are NaN"),
        (but(1e150), "x and y: coordinates 1e+150 apart received, whose costs leave float64's range"),
        (np.full((3, 2), math.nan), "x: 6 of 6 numbers are NaN"),
        (np.zeros((0, 2)), "x: shape (0, 2) holds no points"),
        (np.zeros((3, 0)), "x: shape (3, 0) holds no points"),
        (np.array(3.0), "x: shape () holds no points"),
        (np.zeros((3, 5)), "x has points of dimension 5, y of dimension 2"),
        (np.array([["a", "b"]] * 3), "x: numbers expected, received dtype <U1"),
        (np.zeros((3, 2), np.complex64), "x: numbers expected, received dtype complex64"),
        (np.array([[None, 1]] * 3), "x: numbers expected, received dtype object"),
    ],
)
def test_points_that_are_none(x: np.ndarray, message: str) -> None:
    with pytest.raises(ProblemError, match=re.escape(message)):
        TransportProblem.between(x, Y)
    side = message.replace("x:", "y:").replace("dimension 5, y of dimension 2", "dimension 2, y of dimension 5")
    with pytest.raises(ProblemError, match=re.escape(side)):
        TransportProblem.between(Y, x)
    if x.dtype.kind == "f":
        with pytest.raises(ProblemError, match=re.escape(message)):
            TransportProblem.between(torch.as_tensor(x), torch.as_tensor(Y))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (but(math.nan), "matrix: 1 of 6 numbers are NaN"),
        (np.zeros((0, 2)), "matrix: shape (0, 2) holds no points"),
    ],
)
def test_costs_that_are_none(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(ProblemError, match=re.escape(message)):
        TransportProblem.from_cost(matrix)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        ([1, 2], "a: shape (2,) received, (3,) expected: one weight for each point"),
        ([[1, 2, 3]], "a: shape (1, 3) received, (3,) expected"),
        ([1, -0.5, 1], "a: weights are finite and ≥ 0; the least received is -0.5"),
        ([1, math.nan, 1], "a: weights are finite and ≥ 0; the least received is nan"),
        ([1, math.inf, 1], "a: weights are finite and ≥ 0"),
        ([0, 0, 0], "a: the weights sum to 0: there is no mass to move"),
    ],
)
def test_weights_that_are_none(a: list, message: str) -> None:
    for weights in (np.array(a, np.float64), torch.tensor(a, dtype=torch.float64)):
        with pytest.raises(ProblemError, match=re.escape(message)):
            TransportProblem.between(X, Y, a=weights)
        with pytest.raises(ProblemError, match=re.escape(message.replace("a:", "b:", 1))):
            TransportProblem.from_cost(np.ones((4, 3)), b=weights)


def test_masses_are_equal_up_to_rounding() -> None:
    a = np.array([1.0, 2.0, 3.0])
    with pytest.raises(
        ProblemError, match=r"a has mass 6, b has mass 6\.01: balanced transport moves all of it\n.*hint"
    ):
        TransportProblem.between(X, Y, a=a, b=a + np.array([0, 0, 0.01]))
    with pytest.raises(ProblemError, match="a has mass 3, b has mass 300"):
        TransportProblem.between(X, Y, a=np.ones(3), b=np.full(3, 100.0))
    problem = TransportProblem.between(X, Y, a=a, b=a * (1 + 1e-5))
    for weights in (problem.source_weights(), problem.target_weights()):
        np.testing.assert_allclose(weights, a / 6, rtol=1e-12)


def test_weights_on_one_side_alone_are_normalised() -> None:
    problem = TransportProblem.between(X, Y, a=np.array([1.0, 2.0, 5.0]))
    np.testing.assert_allclose(problem.source_weights(), [1 / 8, 2 / 8, 5 / 8])
    np.testing.assert_allclose(problem.target_weights(), [1 / 3, 1 / 3, 1 / 3])
    assert not problem.uniform
    assert not problem.is_assignment


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf])
def test_epsilons_that_are_none(epsilon: float) -> None:
    with pytest.raises(ProblemError, match=re.escape(f"epsilon: {epsilon} received")):
        TransportProblem.between(X, Y, epsilon=epsilon)
    with pytest.raises(ProblemError, match="epsilon"):
        TransportProblem.from_cost(X, epsilon=epsilon)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Disable run-time type checks, as outside of tests, where names are untrusted."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_a_cost_that_is_none() -> None:
    name: Any = "manhattan"
    with pytest.raises(ProblemError, match=r"cost: 'manhattan' is not a cost\n.*choose one of squared-euclidean, eucl"):
        TransportProblem.between(X, Y, cost=name)


@pytest.mark.usefixtures("unchecked")
def test_a_solver_that_is_none() -> None:
    name: Any = "magic"
    with pytest.raises(ProblemError, match=r"solver: 'magic' is not a solver\n.*choose one of auto, brute-force"):
        solve(TransportProblem.between(X, Y), name)


def test_a_permutation_is_asked_for_where_one_is_optimal() -> None:
    assert TransportProblem.between(X, Y).is_assignment
    assert TransportProblem.between(X, Y, a=np.full(3, 7.0), b=np.ones(3) * 7).is_assignment
    assert TransportProblem.from_cost(np.zeros((2, 2))).is_assignment
    assert not TransportProblem.between(X, Y[:2]).is_assignment
    assert not TransportProblem.between(X, Y, a=np.array([1.0, 2.0, 1.0])).is_assignment
    assert not TransportProblem.between(X, Y, epsilon=0.1).is_assignment


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, lambda a: torch.as_tensor(a).requires_grad_()])
def test_images_are_points(convert: Any) -> None:
    images = convert(np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32))
    problem = TransportProblem.between(images, images)
    assert problem.shape == (4, 4)
    for points in (problem.x, problem.y):
        assert points is not None
        assert points.shape == (4, 12)
        assert str(points.dtype).endswith("float32")
    assert not getattr(problem.x, "requires_grad", False)
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 2, 2)
    plain = TransportProblem.between(pixels, pixels[::-1].copy())
    assert plain.x is not None
    assert np.array_equal(plain.x, pixels.reshape(4, 4))


def test_flat_values_are_points_on_a_line() -> None:
    assert TransportProblem.between(np.arange(3.0), np.arange(4.0)).shape == (3, 4)


def test_one_point_goes_to_one_point() -> None:
    plans = all_plans(TransportProblem.between(np.zeros((1, 2)), np.array([[3.0, 4.0]]), cost="euclidean"))
    assert {"brute-force", "assignment", "network-simplex"} <= plans.keys()
    for name, plan in plans.items():
        assert [part.tolist() for part in plan.entries()] == [[0], [0], [1.0]], name
        assert plan.certificate.primal == pytest.approx(5, rel=1e-6)


def test_points_that_coincide_are_points() -> None:
    x = np.ones((5, 3))
    for name, plan in all_plans(TransportProblem.between(x, x)).items():
        assert plan.certificate.primal == 0, name
        assert plan.certificate.relative_gap == 0, name
        assert sorted(plan.entries()[1].tolist()) == list(range(5)), name
    twice = np.array([[0.0], [0.0], [1.0]])
    for name, plan in all_plans(TransportProblem.between(twice, twice[::-1].copy())).items():
        assert plan.certificate.primal == pytest.approx(0, abs=1e-6), name


@pytest.mark.parametrize(
    ("solver", "problem"),
    [
        ("brute-force", TransportProblem.between(np.zeros((9, 1)), np.ones((9, 1)))),
        ("brute-force", TransportProblem.between(np.zeros((2, 1)), np.ones((3, 1)))),
        ("assignment", TransportProblem.between(np.zeros((2, 1)), np.ones((3, 1)))),
        ("assignment", TransportProblem.between(X, Y, a=np.array([1.0, 2.0, 3.0]))),
        ("assignment", TransportProblem.between(X, Y, epsilon=1.0)),
    ],
)
def test_a_solver_refuses_what_it_does_not_take(solver: Any, problem: TransportProblem) -> None:
    with pytest.raises(ProblemError, match="use solver 'auto'"):
        solve(problem, solver)


@pytest.mark.parametrize("y", [torch.zeros(2, 2), np.zeros((2, 2)), [[0.0, 0.0], [1.0, 1.0]]])
def test_points_of_two_devices_are_refused(y):
    x = torch.zeros(2, 2, device="meta")
    for sides, message in (((x, y), "x is on meta, y on cpu"), ((y, x), "x is on cpu, y on meta")):
        with pytest.raises(ProblemError, match=message) as refused:
            TransportProblem.between(*sides)
        assert "one device" in str(refused.value)
