"""One-step transport compared with GANs: ``python -m benchmarks.one_step [--quick] [--minutes M] [--json FILE]``.

``configs/one-step.yaml`` and the configs with a critic get the same CPU minutes on one thread each, with learning rates
that decrease to zero, and are evaluated with the features of one LeNet, for several seeds. Before,
``configs/features-fashion-mnist.yaml`` learns the features without labels, once for each seed; its minutes are reported
separately. Runs are processes, as many at a time as there are processors.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.generators import (
    ADVERSARIES,
    CONFIGS,
    CPU,
    FULL,
    HOME,
    QUICK,
    Teller,
    TrainingScale,
    picture,
    shards,
    spec_of,
    trained,
)
from benchmarks.report import Row, table, write_json
from pipelines.data.loader import Loader, ShardedDataset
from pipelines.evaluation.features import ClassifierFeatures
from pipelines.evaluation.judging import FeatureJudge
from pipelines.evaluation.result import Evaluation
from pipelines.models.bundle import Bundle
from pipelines.models.network import Network
from pipelines.spec import JobSpec, TransportSpec, load_spec
from pipelines.training.loop import train
from pipelines.training.run import start_run
from pipelines.transport.planner import LocalPlanner

ONE_STEP, ENCODER, REFERENCE = "one-step", "features-fashion-mnist", "lenet-fashion-mnist"
SEEDS = (0, 1, 2)
BAR = 2.0
"""Minimum ratio of the best GAN's Fréchet distance to that of one-step transport."""

WARM, TIMED = 4, 12
"""Minimum numbers of warm-up steps and of timed steps when the cost of a step is measured; both are rounded up to whole
pools."""

LEAST_CLASS = 0.7
"""Minimum frequency of the rarest class, times the number of classes."""


def specified(config: str, scale: TrainingScale, *more: str) -> JobSpec:
    """Return the spec of a config on the data of this run, in one process."""
    return load_spec(CONFIGS / f"{config}.yaml", [*scale.data, "workers.count=1", *more])


def affordable(spec: JobSpec, seconds: float, data: ShardedDataset, encoder: Bundle) -> int:
    """Estimate the number of images that a spec trains on in the given CPU seconds on this machine."""
    starting, cost = _costs(spec, data, encoder)
    return max(int((seconds - starting) / cost), 4 * spec.train.batch)


def run(
    config: str,
    seed: int,
    scale: TrainingScale,
    folder: Path,
    picture_at: Path,
    *more: str,
    seconds: float = 0.0,
    images: int | None = None,
) -> dict[str, float]:
    """Train and evaluate a config.

    Args:
        config: name of the config.
        seed: seed of the job, and of its feature network.
        scale: sizes of the data.
        folder: folder of the networks trained by :func:`learn`.
        picture_at: path for a picture of samples.
        more: further fields of the spec.
        seconds: CPU seconds of the run, if the number of images is not given.
        images: number of training images. Averages of weights have a half-life of a twentieth of them.
    """
    torch.set_num_threads(1)
    data = shards(specified(REFERENCE, scale))
    encoder = Bundle.load(folder / f"{ENCODER}-{seed}")
    fields = (f"seed={seed}", *more)
    images = images or affordable(specified(config, scale, *fields), seconds, data, encoder)
    length = {"images": images, "log_every": max(images // 5, 1), "ema_half_life": max(images // 20, 1)}
    spec = specified(config, scale, *fields, *(f"train.{name}={value}" for name, value in length.items()))
    began = time.process_time()
    network, _ = trained(spec, data, _networks(spec, encoder))
    spent = time.process_time() - began
    reference = Bundle.load(folder / REFERENCE)
    judge = FeatureJudge(ClassifierFeatures("reference", reference), data.train, data.test, scale.samples, 0)
    picture(network, picture_at)
    return judge.scores(network) | {"cpu_seconds": spent, "images": float(spec.train.images)}


def learn(config: str, seed: int, scale: TrainingScale, images: int, folder: Path) -> float:
    """Train a network that the runs use into a folder; return the CPU seconds."""
    torch.set_num_threads(1)
    spec = spec_of(config, scale, images, f"seed={seed}", "train.ema_half_life=null")
    data = shards(spec)
    began = time.process_time()
    network, _ = trained(spec, data)
    spent = time.process_time() - began
    name = config if config == REFERENCE else f"{config}-{seed}"
    Bundle(network, spec.model, data.image, data.classes).save(folder / name)
    return spent


def processes() -> ProcessPoolExecutor:
    """Create a pool with one process per processor; each run uses one thread."""
    return ProcessPoolExecutor(os.cpu_count() or 1, mp_context=multiprocessing.get_context("spawn"))


def learn_all(
    pool: ProcessPoolExecutor, scale: TrainingScale, seeds: Sequence[int], folder: Path, *, quick: bool
) -> float:
    """Train the judge and the features of each seed into a folder; return the mean CPU seconds of the features."""
    shards(specified(REFERENCE, scale))
    judge = pool.submit(learn, REFERENCE, 0, scale, scale.reference, folder)
    images = 2_560 if quick else load_spec(CONFIGS / f"{ENCODER}.yaml").train.images
    encoders = [pool.submit(learn, ENCODER, seed, scale, images, folder) for seed in seeds]
    judge.result()
    return statistics.mean(encoder.result() for encoder in encoders)


def _networks(spec: JobSpec, encoder: Bundle) -> dict[str, Network]:
    names: Sequence[str] = spec.objective.registered if isinstance(spec.objective, TransportSpec) else ()
    return dict.fromkeys(names, encoder.network)


def _costs(spec: JobSpec, data: ShardedDataset, encoder: Bundle) -> tuple[float, float]:
    """Measure the CPU seconds before the first step, and per image."""
    began = time.process_time()
    objective, state = start_run(spec, data, LocalPlanner(), CPU, networks=_networks(spec, encoder))
    starting = time.process_time() - began
    # Whole pools, because the plans of a pool are solved at its first step.
    pool = (getattr(spec.objective, "pool", None) or spec.train.batch) // spec.train.batch
    warm, timed = pool * -(-WARM // pool), pool * -(-TIMED // pool)
    at: list[float] = []
    with Loader(data.train, spec.train.batch, spec.seed) as batches:

        def counted() -> object:
            for batch in itertools.islice(batches, warm + timed + 1):
                at.append(time.process_time())
                yield batch

        never = dict.fromkeys(("images", "log_every", "evaluate_every", "checkpoint_every"), 10**12)
        long = spec.model_copy(update={"train": spec.train.model_copy(update=never)})
        train(long, objective, state, counted(), lambda _: Evaluation({}, {}), Teller("", 1), CPU)  # type: ignore[arg-type]
    return starting, (at[-1] - at[warm]) / timed / spec.train.batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, short runs, one seed: shows that it works")
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU minutes of each run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    parser.add_argument("--pictures", type=Path, default=HOME / "benchmarks", help="where to leave samples")
    arguments = parser.parse_args()
    scale, seeds, seconds = (QUICK, (0,), 2.0) if arguments.quick else (FULL, SEEDS, 60 * arguments.minutes)
    configs = (ONE_STEP, *ADVERSARIES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with processes() as pool:
            learned = learn_all(pool, scale, seeds, folder, quick=arguments.quick)
            print(f"features: {learned:.0f} CPU seconds for a seed", flush=True)
            runs = {
                (config, seed): pool.submit(
                    run, config, seed, scale, folder, arguments.pictures / f"{config}-{seed}.png", seconds=seconds
                )
                for seed in seeds
                for config in configs
            }
            found = {key: future.result() for key, future in runs.items()}
    for (config, seed), scores in found.items():
        told = {name: round(value, 3) for name, value in scores.items() if not name.endswith(("_real", "_gaussian"))}
        print(f"  {config}, seed {seed}: {told}")
    fids = {config: statistics.mean(found[config, seed]["fid"] for seed in seeds) for config in configs}
    minutes = f"{seconds / 60:.3g} CPU minutes"
    best = min(ADVERSARIES, key=lambda config: fids[config])
    rows = [
        Row(f"one step: {minutes}", fids[ONE_STEP], fids[peer], peer, "FID", BAR if peer == best else 1.0)
        for peer in ADVERSARIES
    ]
    least = min(found[ONE_STEP, seed]["smallest_class_share"] for seed in seeds)
    rows.append(
        Row(f"one step: least class, {minutes}", 1 / max(least, 1e-9), 1 / LEAST_CLASS, "limit", "× rarer", 1.0)
    )
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
