"""Problems of many shapes with costs in extended precision, the reference for certificates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from pipelines.transport.problem import TransportProblem

LONG = np.longdouble
FINER = np.finfo(LONG).eps < 1e-18
"""Whether longdouble has the 64-bit mantissa of x87."""

SHAPES = (
    "gaussian",
    "lattice",
    "duplicates",
    "near duplicates",
    "the same points",
    "line",
    "ring",
    "cauchy",
    "lognormal",
    "clusters",
    "one-hot",
)
MATRICES = ("uniform", "integers", "lognormal", "constant", "low rank", "one dear pair")
DIMENSIONS = (1, 1, 2, 2, 3, 3, 5, 16, 17, 40, 784, 3072)


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """A problem with its costs in the highest available precision.

    Attributes:
        problem: problem, including epsilon.
        costs: costs, (n, m) longdouble; infinite for forbidden pairs.
        error: error bounds of the costs, (n, m) longdouble.
        a, b: marginals, longdouble.
        text: description for error messages.
    """

    problem: TransportProblem
    costs: np.ndarray
    error: np.ndarray
    a: np.ndarray
    b: np.ndarray
    text: str

    def __repr__(self) -> str:
        return self.text


def points(rng: np.random.Generator, shape: str, n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Create two sets of points of a given shape, with scale about 1."""
    k = n + m
    match shape:
        case "gaussian":
            found = rng.standard_normal((k, d))
        case "lattice":
            found = rng.integers(-1, 2, (k, d)).astype(float)
        case "duplicates":
            found = rng.standard_normal((3, d))[rng.integers(0, 3, k)]
        case "near duplicates":
            found = rng.standard_normal((3, d))[rng.integers(0, 3, k)]
            found += 10.0 ** rng.integers(-14, -2) * rng.standard_normal((k, d))
        case "the same points":
            base = rng.standard_normal((max(n, m), d))
            found = np.concatenate([base[rng.permutation(len(base))[:size]] for size in (n, m)])
        case "line":
            found = rng.standard_normal((k, 1)) * rng.standard_normal(d)
        case "ring":
            angles = 2 * np.pi * np.concatenate([np.arange(n) / n, np.arange(m) / m + rng.choice([0, 1e-9, 0.01])])
            found = np.stack([np.cos(angles), np.sin(angles)], 1) @ rng.standard_normal((2, d))
        case "cauchy":
            found = rng.standard_cauchy((k, d)).clip(-1e9, 1e9)
        case "lognormal":
            found = rng.lognormal(0, 3, (k, d))
        case "clusters":
            found = rng.standard_normal((k, d)) + 10.0 ** rng.integers(1, 6) * rng.integers(0, 2, (k, 1))
        case _:
            found = np.zeros((k, d))
            found[np.arange(k), rng.integers(0, d, k)] = 1
    return found[:n], found[n:]


def matrix(rng: np.random.Generator, kind: str, n: int, m: int) -> np.ndarray:
    """Create a cost matrix of a given kind."""
    match kind:
        case "uniform":
            return rng.random((n, m)) - rng.choice([0.0, 0.5, 1.0])
        case "integers":
            return rng.integers(-2, 3, (n, m)).astype(float)
        case "lognormal":
            return rng.lognormal(0, 4, (n, m))
        case "constant":
            return np.full((n, m), rng.standard_normal())
        case "low rank":
            return rng.standard_normal((n, 1)) @ rng.standard_normal((1, m))
    found = rng.random((n, m))
    found[rng.integers(0, n)], found[:, rng.integers(0, m)] = 10.0 ** rng.integers(2, 17), 10.0 ** rng.integers(2, 17)
    return found


def weights(rng: np.random.Generator, kind: str, n: int) -> np.ndarray | None:
    """Create weights of a given kind; None if uniform."""
    match kind:
        case "uniform":
            return None
        case "random":
            return rng.random(n) + 1e-3
        case "integers":
            return rng.integers(1, 4, n).astype(float)
        case "uneven":
            return 10.0 ** rng.uniform(-8, 0, n)
    found = rng.integers(0, 3, n).astype(float)
    found[rng.integers(0, n)] = 1
    return found


def true_costs(x: np.ndarray, y: np.ndarray, cost: str, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute costs by definition in longdouble, with error bounds."""
    unit = np.finfo(LONG).eps
    x, y = (side.astype(LONG) for side in (x, y))
    d = x.shape[1]
    if cost == "cosine":
        norms = [np.sqrt((side * side).sum(1)) for side in (x, y)]
        x, y = (side / np.where(norm > 0, norm, 1)[:, None] for side, norm in zip((x, y), norms, strict=True))
        halves = [np.where(norm > 0, 0, LONG(0.5)) for norm in norms]
    squares = np.stack([((row - y) ** 2).sum(1) for row in x])
    if cost == "squared-euclidean":
        return squares, (d + 8) * unit * squares
    if cost == "cosine":
        found = squares / 2 + halves[0][:, None] + halves[1]
        return found, (2 * d + 16) * unit * found + 8 * unit * np.sqrt(squares) + 64 * unit * unit * (d + 8) ** 2
    found = squares ** (LONG(1 if cost == "euclidean" else power) / 2)
    return found, (d + 8) * (4 + power) * unit * found


@st.composite
def cases(draw: st.DrawFn, entropic: bool) -> Case:
    """Draw a problem; its numbers come from a seed, so that Hypothesis shrinks only the description."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    large = draw(st.integers(0, 19)) == 0
    n = draw(st.integers(1, 90 if large else 9))
    square = draw(st.booleans())
    m = n if square else draw(st.integers(1, 40 if large else 9))
    kind = draw(st.sampled_from(["uniform", "uniform", "random", "integers", "uneven", "zeros"]))
    a, b = weights(rng, kind, n), weights(rng, kind, m)
    sides = {"a": a, "b": b} if a is not None else {}
    if a is not None and b is not None:
        sides = {"a": a / a.sum(), "b": b / b.sum()}
    unit = 10.0 ** draw(st.integers(-30, 30))
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(MATRICES))
        costs = matrix(rng, name, n, m) * unit
        offset = draw(st.sampled_from([0.0, 0.0, 1.0, -1e4, 1e8, -1e12]))
        costs = costs + offset * unit
        forbidden = draw(st.sampled_from([0.0, 0.0, 0.3, 0.7]))
        costs[rng.random(costs.shape) < forbidden] = np.inf
        text = f"matrix {name} {n}×{m}, unit {unit:g}, offset {offset:g}, forbidden {forbidden}, weights {kind}"
        epsilon = _epsilon(draw, costs) if entropic else 0.0
        problem = TransportProblem.from_cost(costs, epsilon=epsilon, **sides)
        found, error = costs.astype(LONG), np.zeros(costs.shape, LONG)
    else:
        shape = draw(st.sampled_from(SHAPES))
        d = draw(st.sampled_from(DIMENSIONS))
        cost = draw(st.sampled_from(["squared-euclidean", "squared-euclidean", "euclidean", "cosine", "power"]))
        power = draw(st.sampled_from([0.5, 1.0, 1.5, 3.0])) if cost == "power" else 2.0
        offset = draw(st.sampled_from([0.0, 0.0, 0.0, 1.0, -1e4, 1e8, -1e12]))
        x, y = (unit * (side + offset) for side in points(rng, shape, n, m, d))
        if draw(st.booleans()) and max(np.abs(x).max(), np.abs(y).max()) < 1e38:
            x, y = x.astype(np.float32), y.astype(np.float32)
        found, error = true_costs(x, y, cost, power)
        text = f"{cost} {power:g} of {shape} {n}×{m}, d={d}, {x.dtype}, "
        text += f"unit {unit:g}, offset {offset:g}, weights {kind}"
        epsilon = _epsilon(draw, found.astype(float)) if entropic else 0.0
        problem = TransportProblem.between(x, y, cost=cost, power=power, epsilon=epsilon, **sides)
    return Case(problem, found, error, *_marginals(problem), f"{text}, epsilon {epsilon:g}")


def _epsilon(draw: st.DrawFn, costs: np.ndarray) -> float:
    finite = costs[np.isfinite(costs)]
    spread = float(finite.std()) if len(finite) else 0.0
    size = spread or float(np.abs(finite).max(initial=0.0)) or 1.0
    return size * draw(st.sampled_from([0.003, 0.03, 0.3, 3.0, 100.0]))


def _marginals(problem: TransportProblem) -> tuple[np.ndarray, np.ndarray]:
    n, m = problem.shape
    sides = (problem.a, n), (problem.b, m)
    a, b = (np.full(size, LONG(1) / size) if side is None else side.astype(LONG) for side, size in sides)
    return a, b
