"""Exact plans compared with public solvers: ``python -m benchmarks.transport [--quick] [--json FILE]``.

Costs are squared Euclidean, and all times include the cost matrix. Rows on one thread measure the CPU time of the
process, so other load on the machine does not count, except for its effect on the caches.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lap
import numpy as np
import ot
import torch
from threadpoolctl import threadpool_limits

from benchmarks import images
from benchmarks.report import Row, in_turns, markdown, table, write_json
from pipelines.transport import native
from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from pipelines.transport.solvers import exact
from pipelines.transport.verify import verify

SCREEN = "of which: the screen, a matrix product"
LARGEST, LARGEST_QUICK = 16384, 4096


class Clouds:
    """The points of a run, truncated to the requested size."""

    def __init__(self, path: Path, largest: int) -> None:
        self.pictures, self.source = images.images(path, largest)
        self.noise = images.noise(largest, self.pictures.shape[1])
        self.generated = images.blurred(self.pictures[: largest // 2])

    def noise_to_images(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return self.noise[:n], self.pictures[:n]

    def generated_to_images(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return self.generated[:n], self.pictures[-n:]


def emd(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Solve by POT's network simplex."""
    weights = np.full(len(x), 1 / len(x))
    return ot.emd(weights, weights, ot.dist(x, y), numThreads=1)


def float32_costs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute costs by torch's float32 matrix product and the norms: the fastest public cost matrix."""
    left, right = torch.from_numpy(x), torch.from_numpy(y)
    return torch.addmm((right * right).sum(1)[None, :], left, right.T, alpha=-2).numpy()


def public_solvers() -> dict[str, Callable[[np.ndarray], object]]:
    """Return the installed dense float32 assignment solvers."""
    solvers: dict[str, Callable[[np.ndarray], object]] = {
        f"lapx {name}": partial(getattr(lap, name), return_cost=False) for name in ("lapjvh", "lapjvs")
    }
    if importlib.util.find_spec("lapjv"):
        from lapjv import lapjv

        solvers["lapjv"] = lapjv
    return solvers


def fastest(costs: np.ndarray) -> tuple[str, Callable[[np.ndarray], object]]:
    """Return the fastest public solver for a matrix."""
    seconds = {}
    for name, solver in public_solvers().items():
        started = time.process_time()
        solver(costs)
        seconds[name] = time.process_time() - started
    best = min(seconds, key=seconds.__getitem__)
    return best, public_solvers()[best]


def ours(x: np.ndarray, y: np.ndarray, start: TransportPlan | None = None) -> TransportPlan:
    return solve(TransportProblem.between(x, y), start=start)


def screen(x: np.ndarray, y: np.ndarray) -> object:
    """Compute the screen that the solver reads instead of the costs: a lower bound on the time of a solve."""
    return next(exact.screens_of(TransportProblem.between(x, y)))


def against_pot(clouds: Clouds, quick: bool) -> list[Row]:
    """Compare minibatches with POT's default solver."""
    rows = []
    for n, bar in ((256, 3.5), (1024, 10.0)):
        x, y = clouds.noise_to_images(n)
        pairs = {
            "noise": (x, y),
            "generated": clouds.generated_to_images(n),
            "noise, 64 components": images.principal((x, y), y, 64),
        }
        for label, (x, y) in pairs.items():
            mine, product, peer = in_turns(
                lambda x=x, y=y: ours(x, y),  # type: ignore[misc]
                lambda x=x, y=y: screen(x, y),  # type: ignore[misc]
                lambda x=x, y=y: emd(x, y),  # type: ignore[misc]
                repeats=(5 if quick else 21) if n == 256 else (3 if quick else 9),
                clock=time.process_time,
            )
            rows.append(Row(f"exact, n={n}, {label}", mine, peer, "POT dist + emd", "ms", bar))
            rows.append(Row(SCREEN, product, peer, "POT dist + emd", "ms", 0.0))
    return rows


def against_the_fastest(clouds: Clouds, quick: bool) -> list[Row]:
    """Compare a pool of 4096 points, where POT's default stops before the optimum, with the fastest public solver."""
    rows = []
    pairs = {"noise": clouds.noise_to_images(4096)}
    if not quick:
        pairs["generated"] = clouds.generated_to_images(4096)
    for label, (x, y) in pairs.items():
        name, solver = fastest(float32_costs(x, y))
        mine, product, peer = in_turns(
            lambda x=x, y=y: ours(x, y),  # type: ignore[misc]
            lambda x=x, y=y: float32_costs(x, y),  # type: ignore[misc]
            lambda x=x, y=y, solver=solver: solver(float32_costs(x, y)),  # type: ignore[misc]
            repeats=1 if quick else 3,
            clock=time.process_time,
        )
        rows.append(Row(f"exact, n=4096, {label}", mine, peer, f"float32 product + {name}", "ms", 8.0))
        rows.append(Row(f"exact, n=4096, {label}", mine, product, "float32 product alone", "ms", 0.0))
    return rows


def warm(clouds: Clouds, quick: bool) -> list[Row]:
    """Compare a warm start, after the points of a pool moved by 1% of their spread, with a cold solve."""
    x, y = clouds.noise_to_images(1024)
    before = ours(x, y)
    moved = x + 0.01 * images.noise(1024, x.shape[1], seed=9)
    mine, product, peer = in_turns(
        lambda: ours(moved, y, before),
        lambda: screen(moved, y),
        lambda: emd(moved, y),
        repeats=5 if quick else 15,
        clock=time.process_time,
    )
    name = "exact again, n=1024, points moved 1%"
    return [
        Row(name, mine, peer, "POT dist + emd, cold", "ms", 40.0),
        Row(SCREEN, product, peer, "POT dist + emd, cold", "ms", 0.0),
    ]


def batch(clouds: Clouds, quick: bool) -> list[Row]:
    """Measure 32 minibatch problems on two threads, by wall-clock time."""
    pairs = [(clouds.noise[k : k + 256], clouds.pictures[k : k + 256]) for k in range(0, 32 * 64, 64)]
    problems = [TransportProblem.between(x, y) for x, y in pairs]
    mine, peer = in_turns(
        lambda: exact.solve_batch(problems, threads=2),
        lambda: [emd(x, y) for x, y in pairs],
        repeats=3 if quick else 9,
    )
    return [Row("32 × exact, n=256, 2 threads", mine, peer, "POT dist + emd, in turn", "ms", 6.0)]


def growth(clouds: Clouds, quick: bool) -> list[Row]:
    """Measure the time for doubling sizes: the largest size, and the slope in logarithms."""
    sizes = [1024, 2048, 4096] if quick else [1024, 2048, 4096, 8192, 16384]
    seconds = []
    for n in sizes:
        x, y = clouds.noise_to_images(n)
        (milliseconds,) = in_turns(lambda x=x, y=y: ours(x, y), repeats=3, clock=time.process_time)  # type: ignore[misc]
        seconds.append(milliseconds / 1e3)
        print(f"  n={n}: {milliseconds:.1f} ms", flush=True)
    slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    rows = [Row(f"growth, n={sizes[0]} to {sizes[-1]}", slope, 2.3, "limit", "log–log slope", 1.0)]
    if not quick:
        rows.insert(0, Row(f"exact, n={sizes[-1]}, noise", seconds[-1], 10.0, "limit", "s", 1.0))
    return rows


def verified(clouds: Clouds, quick: bool) -> list[Row]:
    """Measure the verification of an exact plan from the points."""
    rows = []
    for n in (1024, 4096):
        problem = TransportProblem.between(*clouds.noise_to_images(n))
        plan = solve(problem)
        (milliseconds,) = in_turns(partial(verify, problem, plan), repeats=2 if quick else 5)
        rows.append(Row(f"verify, n={n}, noise", milliseconds, 1000.0, "limit", "ms", 1.0))
    return rows


SECTIONS = {
    "verify": verified,
    "pot": against_pot,
    "fastest": against_the_fastest,
    "warm": warm,
    "batch": batch,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, n ≤ 4096, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="keep them as a table")
    parser.add_argument("--only", choices=list(SECTIONS), help="one section")
    parser.add_argument("--images", type=Path, default=images.FASHION_MNIST, help="an IDX file of 28 × 28 images")
    arguments = parser.parse_args()
    clouds = Clouds(arguments.images, LARGEST_QUICK if arguments.quick else LARGEST)
    conditions = f"{clouds.source}; {processor()}; exact plans: {native.implementation()}"
    print(conditions, flush=True)
    torch.set_num_threads(1)
    with threadpool_limits(1):
        rows = [
            row
            for name, section in SECTIONS.items()
            if arguments.only in (None, name)
            for row in section(clouds, arguments.quick)
        ]
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)
    if arguments.markdown:
        arguments.markdown.write_text(f"{conditions}.\n\n{markdown(rows)}")


def processor() -> str:
    """Return the name of the processor, if the system provides it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
