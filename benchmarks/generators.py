"""Comparison of generators: ``python -m benchmarks.generators [--quick] [--only KIND] [--json FILE]``.

A LeNet is trained first. All metrics use its features, so they are comparable within one run, but not with those of
other extractors. ``flows`` trains one network with three couplings of noise and images, and evaluates several numbers
of Euler steps. ``paths`` does the same for a class-conditional network, where plans without knowledge of the classes
are harmful. ``adversaries`` compares the configs with a critic with a Gaussian fitted to the pixels. Everything runs
in this process on one thread, including the solves of plans.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Row, table, write_json
from pipelines.data.loader import Loader, ShardedDataset, open_dataset
from pipelines.evaluation.classification import accuracy
from pipelines.evaluation.features import ClassifierFeatures
from pipelines.evaluation.figures import TILE, encode_png, image_grid
from pipelines.evaluation.generation import sample
from pipelines.evaluation.judging import FeatureJudge
from pipelines.evaluation.result import Evaluation
from pipelines.models.bundle import Bundle, to_uint8
from pipelines.models.flow import FlowUNet
from pipelines.models.network import Generator, Network
from pipelines.spec import JobSpec, load_spec
from pipelines.training.loop import train
from pipelines.training.run import start_run
from pipelines.training.state import TrainState
from pipelines.transport.planner import LocalPlanner

CONFIGS = Path(__file__).parents[1] / "configs"
HOME = Path(".monge")
CPU = torch.device("cpu")

COUPLINGS = {
    "independent pairs": "{kind: independent}",
    "plans of batches": "{kind: batch}",
    "plans of pools": "{kind: pool, points: 4096}",
}
BARS = {
    ("plans of batches", 2): 2.0, ("plans of batches", 4): 2.0,
    ("plans of pools", 4): 2.5, ("plans of pools", 8): 1.54, ("plans of pools", 32): 1.0,
}  # fmt: skip
"""Minimum ratio of the Fréchet distance of independent pairs to that of each coupling, by Euler steps."""

TOLD = {
    "independent pairs": "{kind: independent}",
    "plans of pools": "{kind: pool, points: 4096}",
    "plans of pools, condition-aware": "{kind: pool, points: 4096, condition_weight: 10000}",
}
"""Couplings of a conditional flow; the weight is far larger than the differences of squared distances of noise."""

STEPS = (2, 4, 8, 32)
WAIT_BAR = 1 / 1.05
ADVERSARIES = ("gan", "wasserstein-gan", "learned-transport")


@dataclass(frozen=True)
class TrainingScale:
    """Sizes of data, training and evaluation.

    Attributes:
        data: overrides of the spec's data section.
        reference, flow, adversary: number of training images of each.
        samples: number of samples for the evaluation.
        pool: number of points of a pool.
    """

    data: tuple[str, ...]
    reference: int
    flow: int
    adversary: int
    samples: int
    pool: int


FULL = TrainingScale(("data.source=fashion-mnist",), 1_200_000, 180_000, 300_000, 5_000, 4096)
QUICK = TrainingScale(("data.source=digits", "data.size=12"), 20_000, 2_560, 1_280, 200, 256)


class Teller:
    """Prints the progress of a run."""

    def __init__(self, name: str, images: int) -> None:
        self.name, self.images = name, images

    def metrics(self, values: dict[str, float], images: int) -> None:
        """See :class:`pipelines.training.loop.Listener`."""
        print(
            f"  {self.name}: {images:,}/{self.images:,} images, {values['images_per_second']:.0f} a second", flush=True
        )

    def evaluation(self, evaluation: Evaluation, images: int) -> None:
        """See :class:`pipelines.training.loop.Listener`; ignored, because the evaluation follows later."""

    def checkpoint(self, state: TrainState) -> None:
        """See :class:`pipelines.training.loop.Listener`; ignored."""


def trained(spec: JobSpec, data: ShardedDataset, networks: Mapping[str, Network] | None = None) -> tuple[Any, float]:
    """Train the network of a spec, and return it with the seconds of training.

    Args:
        spec: spec of the job.
        data: data set of the job.
        networks: feature networks by name.
    """
    objective, state = start_run(spec, data, LocalPlanner(), CPU, networks=networks)
    started = time.perf_counter()
    with Loader(data.train, spec.train.batch, spec.seed) as batches:
        teller = Teller(f"{spec.name}, seed {spec.seed}", spec.train.images)
        train(spec, objective, state, batches, lambda _: Evaluation({}, {}), teller, CPU)
    return state.judged.eval(), time.perf_counter() - started


def spec_of(config: str, scale: TrainingScale, images: int, *more: str) -> JobSpec:
    """Return the spec of a config at the scale of this run."""
    train = {"images": images, "log_every": max(images // 5, 1), "ema_half_life": max(images // 12, 1)}
    fields = (*scale.data, *(f"train.{name}={value}" for name, value in train.items()), "workers.count=1")
    return load_spec(CONFIGS / f"{config}.yaml", [*fields, *more])


def flow_distances(
    couplings: Mapping[str, str],
    scale: TrainingScale,
    data: ShardedDataset,
    judge: FeatureJudge,
    folder: Path,
    *,
    conditional: bool = False,
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Train the same network with each coupling; return Fréchet distances by Euler steps, and seconds of training."""
    found: dict[str, dict[int, float]] = {}
    seconds: dict[str, float] = {}
    for name, coupling in couplings.items():
        coupling = coupling.replace("4096", str(scale.pool))
        called = f"{'path' if conditional else 'flow'}-{name.replace(', ', '-').replace(' ', '-')}"
        fields = (f"name={called}", f"objective.coupling={coupling}", "objective.plans=local")
        told = f"model.conditional={str(conditional).lower()}"
        spec = spec_of("flow", scale, scale.flow, *fields, told, "train.precision=bfloat16")
        network, seconds[name] = trained(spec, data)
        assert isinstance(network, FlowUNet)
        found[name] = {}
        for steps in STEPS:
            network.steps = steps
            found[name][steps] = judge.scores(network)["fid"]
        print(f"  {name}: {found[name]}", flush=True)
        picture(network, folder / f"{called}.png")
    return found, seconds


def flows(scale: TrainingScale, data: ShardedDataset, judge: FeatureJudge, folder: Path) -> list[Row]:
    """Compare each coupling with independent pairs."""
    found, seconds = flow_distances(COUPLINGS, scale, data, judge, folder)
    plain = "independent pairs"
    rows = [
        Row(f"{name}, {steps} Euler steps", found[name][steps], found[plain][steps], plain, "FID", bar)
        for (name, steps), bar in BARS.items()
    ]
    return [*rows, Row("time of plans of pools", seconds["plans of pools"], seconds[plain], plain, "s", WAIT_BAR)]


def paths(scale: TrainingScale, data: ShardedDataset, judge: FeatureJudge, folder: Path) -> list[Row]:
    """Compare plans with classes to independent pairs and to plans without classes."""
    found, _ = flow_distances(TOLD, scale, data, judge, folder, conditional=True)
    *others, ours = TOLD
    return [
        Row(f"told the class, {ours}, {steps} Euler steps", found[ours][steps], found[peer][steps], peer, "FID", 1.0)
        for peer in others
        for steps in STEPS
    ]


def adversary_scores(
    scale: TrainingScale, data: ShardedDataset, judge: FeatureJudge, folder: Path
) -> dict[str, dict[str, float]]:
    """Compute the scores of each adversarial config."""
    found = {}
    for config in ADVERSARIES:
        local = ("objective.plans=local",) if config == "learned-transport" else ()
        network, seconds = trained(spec_of(config, scale, scale.adversary, *local), data)
        scores = judge.scores(network)
        print(
            f"  {config}: {seconds:.0f} s, { ({name: round(value, 3) for name, value in scores.items()}) }", flush=True
        )
        found[config] = scores
        picture(network, folder / f"{config}.png")
    return found


def adversaries(scale: TrainingScale, data: ShardedDataset, judge: FeatureJudge, folder: Path) -> list[Row]:
    """Compare each adversarial config with the Gaussian."""
    return [
        Row(config, scores["fid"], scores["fid_gaussian"], "Gaussian of the pixels", "FID", 1.0)
        for config, scores in adversary_scores(scale, data, judge, folder).items()
    ]


KINDS = {"flows": flows, "paths": paths, "adversaries": adversaries}


def picture(network: Generator, path: Path) -> None:
    """Write a grid of samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = to_uint8(sample(network, 64, 0, CPU)).numpy()
    path.write_bytes(encode_png(image_grid(samples, tile=TILE)))


def shards(spec: JobSpec) -> ShardedDataset:
    """Return the sharded data set; shards in ``.monge`` are reused, otherwise this process creates them."""
    from services.sharding.dataset import dataset_address, shard_dataset

    address = dataset_address(HOME, spec.data)
    shard_dataset(spec.data, address, HOME / "cache", workers=0)
    return open_dataset(address)


def judged(scale: TrainingScale) -> tuple[ShardedDataset, FeatureJudge, float]:
    """Return the data, a judge with the features of a LeNet trained on them, and the accuracy of the LeNet."""
    spec = spec_of("lenet-fashion-mnist", scale, scale.reference)
    data = shards(spec)
    network, seconds = trained(spec, data)
    reference = ClassifierFeatures("reference", Bundle(network, spec.model, data.image, data.classes))
    print(f"reference LeNet: {seconds:.0f} s, {reference.identity}", flush=True)
    judge = FeatureJudge(reference, data.train, data.test, scale.samples, spec.seed)
    return data, judge, accuracy(network, data.test, CPU)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images and short runs: shows that it works")
    parser.add_argument("--only", choices=KINDS, help="one part of it")
    parser.add_argument("--json", type=Path, help="where to keep the rows")
    parser.add_argument("--pictures", type=Path, default=HOME / "benchmarks", help="where to leave samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scale = QUICK if arguments.quick else FULL
    data, judge, _ = judged(scale)
    kinds = [arguments.only] if arguments.only else KINDS
    rows = [row for kind in kinds for row in KINDS[kind](scale, data, judge, arguments.pictures)]
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
