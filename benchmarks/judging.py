"""Evaluation on two ranks compared with one: ``python -m benchmarks.judging [--quick] [--json FILE]``.

Evaluates a generator of 28 × 28 images by transport distance and by the features of a LeNet, with random weights and
random images, which do not affect the amount of work. Each rank uses one thread, so two ranks need two free cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.report import Row, table, write_json
from pipelines.data.loader import open_dataset
from pipelines.distributed import agree
from pipelines.evaluation.build import Evaluator
from pipelines.evaluation.features import ClassifierFeatures
from pipelines.models.build import build_model
from pipelines.models.bundle import Bundle
from pipelines.spec import DataSpec, JobSpec, load_spec
from pipelines.spec.models import LeNetSpec
from pipelines.transport.planner import LocalPlanner
from services.sharding.dataset import shard_dataset

CONFIG = Path(__file__).parents[1] / "configs" / "transport-generator.yaml"
CPU = torch.device("cpu")
WORLDS = (1, 2)


def spec_of(samples: int) -> JobSpec:
    return load_spec(CONFIG, ["objective.plans=local", f"evaluation.samples={samples}"])


def evaluate(rank: int, world: int, folder: Path, name: str, samples: int) -> None:
    """Run one rank; rank 0 writes the milliseconds of the first and of the second evaluation."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / f"{name}.store"), world)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    spec, data = spec_of(samples), open_dataset(folder / "data")
    generator = build_model(spec.model, data.image, 1).eval()
    reader = LeNetSpec(kind="lenet")
    bundle = Bundle(build_model(reader, data.image, 2).eval(), reader, data.image, data.classes)
    taken = []
    with agree("preparing"):
        evaluator = Evaluator(spec, data, LocalPlanner(), CPU, ClassifierFeatures("lenet", bundle))
    for _ in range(2):
        started = time.perf_counter()
        with agree("evaluating"):
            evaluator(generator)
        taken.append(1e3 * (time.perf_counter() - started))
    if rank == 0:
        np.savetxt(folder / f"{name}.txt", taken)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 samples and one repeat, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    arguments = parser.parse_args()
    samples, repeats = (2_000, 1) if arguments.quick else (10_000, 3)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = np.random.default_rng(0).integers(0, 256, (3 * samples, 28, 28), dtype=np.uint8)
        np.savez(folder / "images.npz", images=images, labels=np.arange(3 * samples) % 2)
        spec = DataSpec(source=str(folder / "images.npz"), test_fraction=1 / 3 + 0.01)
        shard_dataset(spec, folder / "data", folder / "cache", workers=0)
        times: dict[int, list[np.ndarray]] = {world: [] for world in WORLDS}
        for repeat in range(repeats):
            for world in WORLDS:
                name = f"{world}-{repeat}"
                mp.spawn(evaluate, (world, folder, name, samples), world)  # type: ignore[attr-defined, no-untyped-call]
                times[world].append(np.loadtxt(folder / f"{name}.txt"))
    rows = []
    for index, which in enumerate(("first", "later")):
        one, two = (statistics.median(float(taken[index]) for taken in times[world]) for world in WORLDS)
        rows.append(Row(f"{which} evaluation of {samples:,} samples, two ranks", two, one, "one rank", "ms", 1.6))
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
