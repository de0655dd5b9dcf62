"""Transport plans beside those of the public solvers: ``python -m benchmarks.transport [--quick] [--json FILE]``.

Costs are squared Euclidean and the cost matrix is in every figure. Rows on one thread count the thread's own time.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import lap
import numpy as np
import ot
import torch

from benchmarks import images
from benchmarks.report import Row, in_turns, table, write_json
from pipelines.transport import native
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solvers import exact

Section = Callable[["Clouds", bool], list[Row]]

LARGEST, LARGEST_QUICK = 16384, 4096


class Clouds:
    """The points of a run, cut to the size asked for."""

    def __init__(self, path: Path, largest: int) -> None:
        self.pictures, self.source = images.images(path, largest)
        self.noise = images.noise(largest, self.pictures.shape[1])
        self.generated = images.blurred(self.pictures[:1024])

    def noise_to_images(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return self.noise[:n], self.pictures[:n]

    def generated_to_images(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return self.generated[:n], self.pictures[-n:]


def emd(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """POT's network simplex."""
    weights = np.full(len(x), 1 / len(x))
    return ot.emd(weights, weights, ot.dist(x, y), numThreads=1)


def float32_costs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Torch's float32 product and the norms: the fastest public cost matrix."""
    left, right = torch.from_numpy(x), torch.from_numpy(y)
    return torch.addmm((right * right).sum(1)[None, :], left, right.T, alpha=-2).numpy()


def fastest_lapx(costs: np.ndarray) -> str:
    """Which of lapx's dense float32 solvers is the fastest on a matrix."""
    seconds = {}
    for name in ("lapjvh", "lapjvs"):
        started = time.thread_time()
        getattr(lap, name)(costs, return_cost=False)
        seconds[name] = time.thread_time() - started
    return min(seconds, key=seconds.__getitem__)


def ours(x: np.ndarray, y: np.ndarray, g: np.ndarray | None = None) -> None:
    exact.solve(TransportProblem.between(x, y), g=g).certificate.require_converged()


def exact_rows(clouds: Clouds, quick: bool) -> list[Row]:
    """Exact assignments: against POT and lapx, and how the time grows."""
    torch.set_num_threads(1)
    repeats = 3 if quick else 9
    rows = []
    pairs = [("noise", clouds.noise_to_images), ("generated", clouds.generated_to_images)]
    for n, bar in ((256, 3.5), (1024, 10.0)):
        clouds_of_n = [(label, *make(n)) for label, make in pairs]
        x, y = clouds.noise_to_images(n)
        clouds_of_n.append(("noise, 64 components", *images.principal((x, y), y, 64)))
        for label, x, y in clouds_of_n:
            mine, peer = in_turns(
                lambda x=x, y=y: ours(x, y),  # type: ignore[misc]
                lambda x=x, y=y: emd(x, y),  # type: ignore[misc]
                repeats=repeats if n > 256 else 2 * repeats + 5,
                clock=time.thread_time,
            )
            rows.append(Row(f"exact, n={n}, {label}", mine, peer, "POT dist + emd", "ms", bar))
    rows += [_against_lapx(clouds, 4096, 1 if quick else 3), _warm(clouds, repeats), _batch(clouds, repeats)]
    return rows + _growth(clouds, quick)


def _against_lapx(clouds: Clouds, n: int, repeats: int) -> Row:
    x, y = clouds.noise_to_images(n)
    name = fastest_lapx(float32_costs(x, y))
    mine, peer = in_turns(
        lambda: ours(x, y),
        lambda: getattr(lap, name)(float32_costs(x, y), return_cost=False),
        repeats=repeats,
        clock=time.thread_time,
    )
    return Row(f"exact, n={n}, noise", mine, peer, f"float32 product + lapx {name}", "ms", 8.0)


def _warm(clouds: Clouds, repeats: int) -> Row:
    """A pool whose points moved by 1% of their spread, from its last potentials, against a cold solve."""
    x, y = clouds.noise_to_images(1024)
    g = exact.solve(TransportProblem.between(x, y)).g
    moved = x + 0.01 * images.noise(1024, x.shape[1], seed=9)
    mine, peer = in_turns(lambda: ours(moved, y, g), lambda: emd(moved, y), repeats=repeats, clock=time.thread_time)
    return Row("exact again, n=1024, points moved 1%", mine, peer, "POT dist + emd, cold", "ms", 40.0)


def _batch(clouds: Clouds, repeats: int) -> Row:
    """32 problems of a minibatch each, on two threads, by the wall clock."""
    pairs = [(clouds.noise[k : k + 256], clouds.pictures[k : k + 256]) for k in range(0, 32 * 64, 64)]
    problems = [TransportProblem.between(x, y) for x, y in pairs]
    mine, peer = in_turns(
        lambda: exact.solve_batch(problems, threads=2), lambda: [emd(x, y) for x, y in pairs], repeats=repeats
    )
    return Row("32 × exact, n=256, 2 threads", mine, peer, "POT dist + emd, in turn", "ms", 6.0)


def _growth(clouds: Clouds, quick: bool) -> list[Row]:
    """Time at doubling sizes: the largest, and the slope in logarithms."""
    sizes = [1024, 2048, 4096] if quick else [1024, 2048, 4096, 8192, 16384]
    seconds = []
    for n in sizes:
        x, y = clouds.noise_to_images(n)
        (milliseconds,) = in_turns(lambda x=x, y=y: ours(x, y), repeats=3, clock=time.thread_time)  # type: ignore[misc]
        seconds.append(milliseconds / 1e3)
        print(f"  n={n}: {milliseconds:.1f} ms; the screen holds {_screen_mebibytes(n):.0f} MiB", flush=True)
    slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    rows = [Row(f"growth, n={sizes[0]} to {sizes[-1]}", slope, 2.3, "limit", "log–log slope", 1.0)]
    if not quick:
        rows.insert(0, Row(f"exact, n={sizes[-1]}, noise", seconds[-1], 10.0, "limit", "s", 1.0))
    return rows


def _screen_mebibytes(n: int) -> float:
    return n * n * (2 if native.has_bfloat16() else 4) / 2**20


SECTIONS: dict[str, Section] = {"exact": exact_rows}

OPTIONAL_PEERS = {"lapjv": "src-d's lapjv", "torchcfm": "TorchCFM", "ott": "OTT-JAX", "geomloss": "GeomLoss"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, n ≤ 4096, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    parser.add_argument("--only", choices=list(SECTIONS), help="one section")
    parser.add_argument("--images", type=Path, default=images.FASHION_MNIST, help="an IDX file of 28 × 28 images")
    arguments = parser.parse_args()
    clouds = Clouds(arguments.images, LARGEST_QUICK if arguments.quick else LARGEST)
    print(f"{clouds.source}; native solver: {native.native_level() or 'absent'}", flush=True)
    absent = [label for module, label in OPTIONAL_PEERS.items() if importlib.util.find_spec(module) is None]
    if absent:
        print(f"not installed, left out: {', '.join(absent)} (extra [bench])")
    rows = [
        row
        for name, section in SECTIONS.items()
        if arguments.only in (None, name)
        for row in section(clouds, arguments.quick)
    ]
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
