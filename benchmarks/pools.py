"""Effect of the pool size: ``python -m benchmarks.pools [--quick] [--minutes M] [--json FILE] [--picture PNG]``.

``configs/one-step.yaml`` is trained without a pool and with pools of increasing size, for equally many steps and for
equal CPU minutes on one thread, and evaluated with the features of one LeNet. Runs are processes, as many at a time as
there are processors.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.generators import FULL, HOME, QUICK
from benchmarks.one_step import ONE_STEP, learn_all, processes, run
from benchmarks.report import Row, table, write_json

BATCH, POOLS = 128, (256, 1024, 4096)
IMAGES = 120_000
"""Number of training images of each run in the comparison at equal steps."""

STEPS, TIME = "equal steps", "equal time"
SEED = 0

Distances = Mapping[tuple[str, int], float]


def rows(found: Distances, pools: Sequence[int], images: int, minutes: str) -> list[Row]:
    """Compare larger pools with smaller ones, and with a batch: 64 samples by 128 images in each plan."""
    at_steps, at_time = ({n: found[kind, n] for n in (BATCH, *pools)} for kind in (STEPS, TIME))
    least, middle, *_, largest = pools
    best = min((BATCH, *pools[:-1]), key=lambda n: at_time[n])
    return [
        *(
            Row(f"one step: pool of {n}, {images:,} images", at_steps[n], at_steps[BATCH], "no pool", "FID", 1.0)
            for n in pools
        ),
        Row(f"one step: pool of {middle}, {minutes}", at_time[middle], at_time[least], f"{least}", "FID", 1.0),
        Row(f"one step: pool of {largest}, {minutes}", at_time[largest], at_time[best], f"{best}", "FID", 1.0),
    ]


def draw(found: Distances, pools: Sequence[int], images: int, minutes: str, path: Path) -> None:
    """Plot both curves to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    sizes = (BATCH, *pools)
    for kind, label in ((STEPS, f"{images:,} images"), (TIME, minutes)):
        axes.plot(sizes, [found[kind, n] for n in sizes], "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set_xlabel("samples in a pool, twice those in a plan; 128: no pool")
    axes.set_ylabel("Fréchet distance, Fashion-MNIST")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, short runs: shows that it works")
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU minutes of each run of equal time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw both curves")
    arguments = parser.parse_args()
    quick = arguments.quick
    scale, seconds, pools = (QUICK, 2.0, (256, 512, 1024)) if quick else (FULL, 60 * arguments.minutes, POOLS)
    images = 2_560 if quick else IMAGES
    minutes = f"{seconds / 60:.3g} CPU minutes"
    with tempfile.TemporaryDirectory() as temporary, processes() as pool:
        folder = Path(temporary)
        learn_all(pool, scale, (SEED,), folder, quick=quick)
        futures = {}
        for n in sorted((BATCH, *pools), reverse=True):  # the slowest first
            more = () if n == BATCH else (f"objective.pool={n}",)
            for kind in (STEPS, TIME):
                length = {"images": images} if kind == STEPS else {"seconds": seconds}
                at = HOME / "benchmarks" / f"pool-of-{n}-{kind.replace(' ', '-')}.png"
                futures[kind, n] = pool.submit(run, ONE_STEP, SEED, scale, folder, at, *more, **length)
        scores = {key: future.result() for key, future in futures.items()}
    for (kind, n), told in scores.items():
        print(
            f"  {kind}, pool of {n}: FID {told['fid']:.2f}, {told['images']:,.0f} images, {told['cpu_seconds']:.0f} s"
        )
    found = {key: told["fid"] for key, told in scores.items()}
    print(table(rows(found, pools, images, minutes)))
    if arguments.json:
        write_json(rows(found, pools, images, minutes), arguments.json)
    if arguments.picture:
        draw(found, pools, images, minutes, arguments.picture)


if __name__ == "__main__":
    main()
