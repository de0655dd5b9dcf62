"""Growth of the cost of an exact plan with n, compared with the article's n! and n³.

``python -m benchmarks.growth [--quick] [--json FILE] [--plot FILE]``: brute force over all permutations, the network
simplex and the solver that ``auto`` selects, between noise and images.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks import images
from benchmarks.report import Row, table, write_json
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import SolverName, solve

SIZES: dict[SolverName, tuple[int, ...]] = {
    "brute-force": (4, 5, 6, 7, 8),
    "network-simplex": (128, 256, 512, 1024, 2048),
    "auto": (128, 256, 512, 1024, 2048, 4096, 8192),
}
QUICK = 1024
ARTICLE_SLOPE = 3.0
"""Slope of the simplex on n × n problems, according to the article."""
BARS: dict[SolverName, float] = {"network-simplex": 1.0, "auto": ARTICLE_SLOPE / 2.3}


def main() -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"n up to {QUICK}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there, as PNG")
    parser.add_argument("--images", type=Path, default=images.FASHION_MNIST, help="an IDX file of images")
    given = parser.parse_args()
    largest = QUICK if given.quick else max(SIZES["auto"])
    pictures, source = images.images(given.images, largest)
    noise = images.noise(largest, pictures.shape[1])
    curves = {
        solver: {n: _milliseconds(solver, noise[:n], pictures[:n]) for n in sizes if n <= largest}
        for solver, sizes in SIZES.items()
    }
    print(f"noise against {source}")
    rows = [_row(solver, curves[solver], bar) for solver, bar in BARS.items()]
    print(table(rows))
    if given.json:
        write_json(rows, given.json)
    if given.plot:
        _plot(curves, source, given.plot)


def slope(curve: dict[int, float], least: int = 0) -> float:
    """Compute the slope of log time over log n, by least squares."""
    points = [(math.log(n), math.log(taken)) for n, taken in curve.items() if n >= least]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def _milliseconds(solver: SolverName, x: np.ndarray, y: np.ndarray) -> float:
    problem = TransportProblem.between(x, y)
    solve(problem, solver)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        solve(problem, solver)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def _row(solver: SolverName, curve: dict[int, float], bar: float) -> Row:
    sizes = [n for n in curve if n >= 256]
    name = f"slope of {solver}, n = {sizes[0]}…{sizes[-1]}"
    return Row(name, slope(curve, least=256), ARTICLE_SLOPE, "the article's n³", "log ms / log n", bar)


def _plot(curves: dict[SolverName, dict[int, float]], source: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    labels = {"brute-force": "all n! permutations", "network-simplex": "network simplex", "auto": "Monge, auto"}
    for solver, curve in curves.items():
        axes.loglog(list(curve), list(curve.values()), "o-", label=f"{labels[solver]} (slope {slope(curve):.1f})")
    simplex, brute = curves["network-simplex"], curves["brute-force"]
    first, last = min(brute), max(curves["auto"])
    anchor = min(simplex)
    sizes = np.geomspace(first, last, 50)
    axes.loglog(sizes, simplex[anchor] * (sizes / anchor) ** 3, "--", color="grey", label="n³")
    few = np.linspace(first, 12, 50)
    factorial = np.array([math.gamma(n + 1) for n in few])
    axes.loglog(few, brute[8] * factorial / math.factorial(8), ":", color="grey", label="n!")
    axes.set_ylim(min(min(curve.values()) for curve in curves.values()) / 3, 1e6)
    axes.set(xlabel="points on each side", ylabel="milliseconds", title=f"An exact plan, noise against {source}")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
