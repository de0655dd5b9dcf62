"""The exact solver compared with SciPy in float64, for every build and many kinds of difficult data."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from pipelines.errors import ProblemError, TransportError
from pipelines.transport import native
from pipelines.transport.native import library
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import choose
from pipelines.transport.solve import solve as solve_any
from pipelines.transport.solvers import exact, screen

METRICS = {"squared-euclidean": "sqeuclidean", "euclidean": "euclidean", "cosine": "cosine"}

needs_native = pytest.mark.skipif(not native.usable_levels(), reason="the native solver is not built")


@pytest.fixture(params=[*native.LEVELS, "off"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in (*native.usable_levels(), "off"):
        pytest.skip(f"{request.param}: not built, or not on this processor")
    monkeypatch.setenv("MONGE_SIMD", request.param)
    return request.param


def gaussian(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d), dtype=np.float32), rng.standard_normal((n, d), dtype=np.float32)


def verify(plan: TransportPlan, costs: np.ndarray, tolerance: float) -> None:
    """Check that a plan is a permutation at most as expensive as SciPy's, with feasible potentials and valid bounds."""
    n = len(costs)
    scale = max(float(np.abs(costs).max()), 1e-300)
    rows, columns = linear_sum_assignment(costs)
    best = costs[rows, columns].mean()
    assert plan.assignment is not None
    assert plan.f is not None
    assert plan.g is not None
    np.testing.assert_array_equal(np.sort(plan.assignment), np.arange(n))
    mine = costs[np.arange(n), plan.assignment].mean()
    assert (mine - best) / scale <= tolerance
    assert (costs - plan.f[:, None] - plan.g).min() / scale >= -tolerance
    assert plan.certificate.converged
    assert abs(plan.certificate.primal - mine) / scale <= tolerance
    assert abs(plan.certificate.dual - (plan.f.mean() + plan.g.mean())) / scale <= tolerance
    assert -tolerance <= plan.certificate.gap / scale <= tolerance


def costs_between(x: np.ndarray, y: np.ndarray, cost: str = "squared-euclidean") -> np.ndarray:
    return cdist(x.astype(np.float64), y.astype(np.float64), METRICS[cost])


@pytest.mark.parametrize("d", [1, 2, 17, 33])
def test_every_small_size(level: str, d: int) -> None:
    for n in range(1, 71):
        x, y = gaussian(n, d, seed=n)
        plan = exact.solve(TransportProblem.between(x, y))
        verify(plan, costs_between(x, y), 1e-6 if level == "off" else 1e-13)


@pytest.mark.parametrize("n", [257, 1000, 1025])
def test_odd_sizes(level: str, n: int) -> None:
    x, y = gaussian(n, 40)
    plan = exact.solve(TransportProblem.between(x, y))
    verify(plan, costs_between(x, y), 1e-6 if level == "off" else 1e-13)
    assert plan.certificate.solver == ("assignment" if level == "off" else "exact")


@needs_native
@pytest.mark.parametrize("cost", list(METRICS))
@pytest.mark.parametrize(("n", "d"), [(130, 2), (300, 16), (300, 60)])
def test_every_cost(cost: str, n: int, d: int) -> None:
    x, y = gaussian(n, d)
    plan = exact.solve(TransportProblem.between(x, y, cost=cost))  # type: ignore[arg-type]
    # Points are divided by their norms in float32, which the cosine feels.
    verify(plan, costs_between(x, y, cost), 1e-6 if cost == "cosine" else 1e-13)
    assert plan.certificate.solver == "exact"


@needs_native
def test_a_point_at_the_origin_has_cosine_cost_one() -> None:
    x, y = gaussian(40, 20)
    x[3], y[5] = 0, 0
    costs = 1 - (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)) @ (
        y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12)
    ).T.astype(np.float64)
    verify(exact.solve(TransportProblem.between(x, y, cost="cosine")), costs, 1e-6)


CLOUDS = {
    "offset": lambda x, y: (x + 1000, y + 1000),
    "opposite offsets": lambda x, y: (x + 1000, y - 1000),
    "tiny": lambda x, y: (x * np.float32(1e-18), y * np.float32(1e-18)),
    "huge": lambda x, y: (x * np.float32(1e16), y * np.float32(1e16)),
    "duplicates": lambda x, y: (np.repeat(x[:30], 5, 0), np.repeat(y[:30], 5, 0)),
    "the same cloud": lambda x, y: (x, x[::-1].copy()),
    "integers": lambda x, y: (np.round(x), np.round(y)),
    "collinear": lambda x, y: (np.outer(x[:, 0], np.ones(30)), np.outer(y[:, 0], np.ones(30))),
    "one coordinate": lambda x, y: (x[:, :1], y[:, :1]),
    "two coordinates": lambda x, y: (x[:, :2], y[:, :2]),
}


@needs_native
@pytest.mark.parametrize("name", list(CLOUDS))
def test_awkward_clouds(name: str) -> None:
    x, y = (np.ascontiguousarray(side, np.float32) for side in CLOUDS[name](*gaussian(150, 40)))
    plan = exact.solve(TransportProblem.between(x, y))
    verify(plan, costs_between(x, y), 1e-13)
    assert plan.certificate.solver == "exact"


@needs_native
def test_many_coordinates() -> None:
    x, y = gaussian(100, 5000)
    # The primal is an upper bound, of sums of 5000 terms.
    verify(exact.solve(TransportProblem.between(x, y)), costs_between(x, y), 2e-12)


@needs_native
def test_far_clusters_in_the_plane() -> None:
    x, y = gaussian(200, 2)
    x[::2] += 1e4
    y[1::2] += 1e4
    plan = exact.solve(TransportProblem.between(x, y))
    verify(plan, costs_between(x, y), 1e-13)
    assert plan.certificate.solver == "exact"


def test_all_points_equal(level: str) -> None:
    x = np.ones((100, 20), np.float32)
    plan = exact.solve(TransportProblem.between(x, x))
    verify(plan, np.zeros((100, 100)), 1e-6)


MATRICES = {
    "uniform": lambda rng, n: rng.random((n, n)),
    "negative": lambda rng, n: -rng.random((n, n)),
    "lognormal": lambda rng, n: rng.lognormal(0, 2, (n, n)),
    "binary": lambda rng, n: rng.integers(0, 2, (n, n)),
    "few integers": lambda rng, n: rng.integers(0, 10, (n, n)),
    "many integers": lambda rng, n: rng.integers(0, 1000, (n, n)),
    "rank one": lambda rng, n: np.outer(np.arange(n), np.arange(n)),
    "zeros": lambda rng, n: np.zeros((n, n)),
}


@pytest.mark.parametrize("n", [5, 131, 400])
@pytest.mark.parametrize("name", list(MATRICES))
def test_cost_matrices(level: str, name: str, n: int) -> None:
    matrix = MATRICES[name](np.random.default_rng(1), n).astype(np.float32)
    plan = exact.solve(TransportProblem.from_cost(matrix))
    verify(plan, matrix.astype(np.float64), 1e-6)


@needs_native
def test_lapx_takes_the_matrices_that_defeat_candidate_lists() -> None:
    rng = np.random.default_rng(0)
    # Two levels alone are ties at a glance; a fourth power near 0 shows only in the rows left to the search.
    for matrix, reason in ((rng.integers(0, 2, (300, 300)), "equal"), (rng.random((300, 300)) ** 12, "lists")):
        plan = exact.solve(TransportProblem.from_cost(matrix.astype(np.float32)))
        assert plan.certificate.solver == "assignment"
        assert reason in plan.certificate.reason


@needs_native
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_product_screen_is_within_its_error(bfloat16: bool) -> None:
    x, y = gaussian(120, 50)
    x += 3
    screened = screen.from_products(x, y, bfloat16=bfloat16)
    stored = screened.screen.matrix
    if bfloat16:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    entries = costs_between(x, y) / screened.unit - screened.row[:, None] - screened.column
    assert screened.screen.error is not None
    rounding = np.abs(stored).max(1) * 2.0**-8 if bfloat16 else 0
    over = (-stored.astype(np.float64) - entries).max(1)
    assert (over <= screened.screen.error + rounding).all()
    assert over.max() > 0


@needs_native
@pytest.mark.parametrize("make", [screen.from_distances, lambda x, y: screen.from_differences(x, y, root=True)])
def test_a_distance_screen_is_a_lower_bound(make) -> None:  # type: ignore[no-untyped-def]
    x, y = gaussian(120, 50)
    y[:20] = x[:20]
    screened = make(x, y)
    entries = costs_between(x, y, "euclidean") / screened.unit
    assert (screened.screen.matrix <= entries).all()
    assert screened.screen.matrix.mean() > 0.9 * entries.mean()


@needs_native
def test_a_coarse_screen_says_so() -> None:
    x, y = gaussian(200, 20)
    x[::2] += 1e4
    y[1::2] += 1e4
    screened = screen.from_products(x, y, bfloat16=True)
    assert native.assign(screened.screen, screened.points).status == "too coarse"


@needs_native
def test_a_spent_budget_says_so() -> None:
    x, y = gaussian(200, 20)
    screened = screen.from_products(x, y, bfloat16=False)
    assert native.assign(screened.screen, screened.points, budget=50).status == "out of budget"


@needs_native
def test_shortest_paths_do_not_look_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = TransportProblem.between(*gaussian(300, 2))
    screened = next(iter(exact.screens_of(problem)))
    free = native.assign(screened.screen, screened.points)
    assert free.status == "solved"
    assert 0 < free.looks < exact.LOOKS * 300**2 / 100
    assert native.assign(screened.screen, screened.points, looks=free.looks - 1).status == "out of budget"
    monkeypatch.setattr(exact, "LOOKS", 0)
    assert exact.solve(problem).certificate.solver == "assignment"


@needs_native
def test_old_potentials_are_a_start() -> None:
    x, y = gaussian(300, 40)
    first = exact.solve(TransportProblem.between(x, y))
    moved = x + 0.01 * gaussian(300, 40, seed=5)[0]
    problem = TransportProblem.between(moved, y)
    warm, cold = exact.solve(problem, g=first.g), exact.solve(problem)
    verify(warm, costs_between(moved, y), 1e-13)
    np.testing.assert_array_equal(warm.assignment, cold.assignment)
    assert warm.certificate.iterations < cold.certificate.iterations


def test_misleading_potentials_mislead_nobody(level: str) -> None:
    x, y = gaussian(90, 20)
    g = 100 * np.random.default_rng(3).standard_normal(90)
    plan = exact.solve(TransportProblem.between(x, y), g=g)
    verify(plan, costs_between(x, y), 1e-6)


def test_a_batch_is_its_problems_solved_one_by_one(level: str) -> None:
    problems = [TransportProblem.between(*gaussian(n, 30, seed=n)) for n in (64, 100, 100, 129, 1)]
    threads = torch.get_num_threads()
    batch = exact.solve_batch(problems, threads=2)
    assert torch.get_num_threads() == threads
    for plan, problem in zip(batch, problems, strict=True):
        np.testing.assert_array_equal(plan.assignment, exact.solve(problem).assignment)
    assert exact.solve_batch([]) == []


def test_it_refuses_what_is_no_assignment() -> None:
    x, y = gaussian(4, 3)
    with pytest.raises(ProblemError, match="4 × 3"):
        exact.solve(TransportProblem.between(x, y[:3]))
    with pytest.raises(ProblemError, match=r"g: finite potentials of shape \(4,\)"):
        exact.solve(TransportProblem.between(x, y), g=np.zeros(3))


@pytest.mark.parametrize(("n", "d"), [(1, 1), (20, 3), (20, 30), (200, 30)])
def test_auto_takes_it_where_it_is_built(level: str, n: int, d: int) -> None:
    problem = TransportProblem.between(*gaussian(n, d))
    name, reason = choose(problem)
    assert name == ("exact" if level != "off" else "assignment")
    assert ("MONGE_SIMD is off" in reason) == (level == "off")
    certificate = solve_any(problem).certificate
    assert certificate.solver == name
    assert certificate.reason == reason


def test_a_plan_before_is_a_start() -> None:
    x, y = gaussian(300, 40)
    before = solve_any(TransportProblem.between(x, y))
    problem = TransportProblem.between(x + np.float32(0.01), y)
    plan = solve_any(problem, start=before)
    np.testing.assert_array_equal(plan.assignment, solve_any(problem).assignment)
    assert ("from the potentials" in plan.certificate.reason) == native.native_available()
    with pytest.raises(ProblemError, match="300 × 300 points received for a problem of 299 × 299"):
        solve_any(TransportProblem.between(x[1:], y[1:]), start=before)


def test_a_start_without_potentials_is_none() -> None:
    x, y = gaussian(100, 20)
    problem = TransportProblem.between(x, y)
    plan = solve_any(problem, start=dataclasses.replace(solve_any(problem), f=None, g=None))
    assert "from the potentials" not in plan.certificate.reason


@pytest.fixture
def heard() -> Iterator[None]:
    """Make Ctrl-C raise in the main thread, even if the tests run in the background, where the shell disables it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@needs_native
def test_a_long_solve_ends_when_it_is_interrupted(monkeypatch: pytest.MonkeyPatch, heard: None) -> None:
    monkeypatch.setattr(native, "INTERRUPTIBLE", 1)
    stop = ctypes.c_int32(0)
    deadline = time.monotonic() + 30

    def call() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.value and time.monotonic() < deadline:
            time.sleep(0.001)
        return stop.value

    with pytest.raises(KeyboardInterrupt):
        native._interruptible(call, stop, 1)
    assert stop.value == 1


@needs_native
def test_it_stops_when_told(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if level == "off":
        pytest.skip("lapx hears nothing")

    def stopped(call: Callable[[], int], stop: ctypes.c_int32, n: int) -> int:
        stop.value = 1
        return call()

    monkeypatch.setattr(native, "_interruptible", stopped)
    screened = screen.from_products(*gaussian(200, 20), bfloat16=False)
    assert native.assign(screened.screen, screened.points).status == "stopped"


def test_it_says_what_makes_exact_plans(level: str) -> None:
    found = native.implementation()
    assert found.name == ("lapx" if level == "off" else "native")
    assert str(found).endswith(f"MONGE_SIMD is {level}")


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear the cached search for builds, before and after the test."""
    monkeypatch.delenv("MONGE_SIMD", raising=False)
    caches = (library._library, library._processor, library._level)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


MISSING = [("EXTENSION_SUFFIXES", [".no-such-file"], "no C++ compiler"), ("_VERSION", -1, "from other sources")]


@pytest.mark.parametrize(("what", "value", "reason"), MISSING)
def test_a_build_that_is_missing_or_old_is_not_called(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, what: str, value: object, reason: str
) -> None:
    if what == "_VERSION" and not any(Path(native.__file__).parent.glob("_assignment_baseline*")):
        pytest.skip("there is no build at all")
    monkeypatch.setattr(library, what, value)
    assert native.usable_levels() == ()
    assert native.implementation().name == "lapx"
    assert reason in native.implementation().reason
    certificate = solve_any(TransportProblem.between(*gaussian(100, 20))).certificate
    assert certificate.solver == "assignment"
    assert reason in certificate.reason
    with pytest.raises(TransportError, match=re.escape(reason)):
        native.summarise(np.zeros((2, 2), np.float32))


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGE_SIMD", "mmx")
    with pytest.raises(TransportError, match="mmx"):
        native.native_level()


def test_tensors_are_points_too() -> None:
    x, y = gaussian(50, 30)
    plan = exact.solve(TransportProblem.between(torch.from_numpy(x), torch.from_numpy(y)))
    verify(plan, costs_between(x, y), 1e-6)
