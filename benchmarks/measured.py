"""The table "Measured" of README.md: ``python -m benchmarks.measured [--quick] [--only ROW …] [--out FOLDER]``.

Each row trains its configs in this process on one thread, including the solves of plans, and stores its figures in
``measured.json``; rows that are not run keep their previous figures. ``measured.md`` has the table of all rows. Times
and ratios have separate commands: ``benchmarks.transport``, ``benchmarks.transport_entropic``, ``benchmarks.service``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.generators import (
    ADVERSARIES,
    CONFIGS,
    COUPLINGS,
    CPU,
    FULL,
    HOME,
    QUICK,
    STEPS,
    TOLD,
    TrainingScale,
    adversary_scores,
    flow_distances,
    judged,
    picture,
    shards,
    trained,
)
from pipelines.data.loader import ShardedDataset
from pipelines.evaluation.classification import accuracy
from pipelines.evaluation.features import ClassifierFeatures
from pipelines.evaluation.generation import TransportJudge
from pipelines.evaluation.judging import FeatureJudge
from pipelines.models.bundle import Bundle
from pipelines.models.network import Classifier, Generator, Network
from pipelines.spec import JobSpec, load_spec
from pipelines.transport.planner import LocalPlanner

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
SMALL = TrainingScale(QUICK.data, reference=2_560, flow=512, adversary=512, samples=100, pool=128)

Figures = dict[str, float]


@dataclass(frozen=True)
class ConfigRow:
    """A row of the table.

    Attributes:
        what: subject of the row.
        by: configs of the row.
        run: function that computes the figures for a seed.
        seeds: seeds, run one after the other.
        judged: whether the evaluation uses the features of a reference; its name and hash are stored with the figures.
    """

    what: str
    by: tuple[str, ...]
    run: Callable[[Bench, int], Figures]
    seeds: tuple[int, ...] = (0,)
    judged: bool = False


class Bench:
    """State shared by the rows of a run.

    Args:
        quick: whether to use small images and short runs, only to check that everything works.
        pictures: folder for pictures of samples.
    """

    def __init__(self, quick: bool, pictures: Path) -> None:
        self.quick, self.pictures = quick, pictures

    @cached_property
    def reference(self) -> tuple[ShardedDataset, FeatureJudge, float]:
        """Return the data, the judge with the features of a LeNet, trained once, and the accuracy of the LeNet."""
        return judged(self.scale)

    @property
    def scale(self) -> TrainingScale:
        """Scale of the rows that the reference evaluates."""
        return SMALL if self.quick else FULL

    def network(
        self, config: str, seed: int, networks: Mapping[str, Network] | None = None
    ) -> tuple[JobSpec, ShardedDataset, Any]:
        """Train a config; return its spec, data and network. ``networks`` are the feature networks, if it uses any."""
        fields = [f"seed={seed}", "workers.count=1"]
        spec = load_spec(CONFIGS / f"{config}.yaml", fields)
        images = 4 * spec.train.batch if self.quick else spec.train.images
        fields += [f"train.images={images}", f"train.log_every={max(images // 5, 1)}"]
        spec = load_spec(CONFIGS / f"{config}.yaml", [*fields, *(QUICK.data if self.quick else ())])
        data = shards(spec)
        return spec, data, trained(spec, data, networks)[0]


def classifies(config: str) -> Callable[[Bench, int], Figures]:
    """Measure the held-out accuracy of a config."""

    def run(bench: Bench, seed: int) -> Figures:
        _, data, network = bench.network(config, seed)
        assert isinstance(network, Classifier)
        return {"held-out accuracy": accuracy(network, data.test, CPU)["accuracy"]}

    return run


def generates(config: str) -> Callable[[Bench, int], Figures]:
    """Measure the exact transport cost to held-out images: of samples, of real images and of a Gaussian."""

    def run(bench: Bench, seed: int) -> Figures:
        _, data, network = bench.network(config, seed)
        assert isinstance(network, Generator)
        picture(network, bench.pictures / f"{config}-{seed}.png")
        judge = TransportJudge(data.train, data.test, "squared-euclidean", LocalPlanner(), seed)
        found = judge.judge(network, CPU)
        return {
            "transport cost": found.generator,
            "of real images": found.real_floor,
            "of a Gaussian": found.gaussian_baseline,
        }

    return run


def asks(config: str, classifier: str) -> Callable[[Bench, int], Figures]:
    """Measure the fraction of samples that a classifier assigns to the requested class."""

    def run(bench: Bench, seed: int) -> Figures:
        spec, data, reader = bench.network(classifier, seed)
        extractor = ClassifierFeatures(classifier, Bundle(reader, spec.model, data.image, data.classes))
        _, data, network = bench.network(config, seed)
        picture(network, bench.pictures / f"{config}-{seed}.png")
        judge = FeatureJudge(extractor, data.train, data.test, bench.scale.samples, seed, classes=data.classes)
        scores = judge.scores(network)
        return {
            "samples of the class that was asked for": scores["asked_class_share"],
            "held-out accuracy of the classifier": accuracy(reader, data.test, CPU)["accuracy"],
        }

    return run


def one_step(bench: Bench, seed: int) -> Figures:
    """Measure the FID of one-step transport in features learned before without labels."""
    _, judge, _ = bench.reference
    _, _, encoder = bench.network("features-fashion-mnist", seed)
    _, _, network = bench.network("one-step", seed, {"fashion-mnist-features": encoder})
    picture(network, bench.pictures / f"one-step-{seed}.png")
    scores = judge.scores(network)
    return {"FID": scores["fid"], "of real images": scores["fid_real"], "of a Gaussian": scores["fid_gaussian"]}


def games(bench: Bench, seed: int) -> Figures:
    """Measure the FIDs of adversarial configs, of real images and of a Gaussian."""
    data, judge, _ = bench.reference
    found = adversary_scores(bench.scale, data, judge, bench.pictures)
    figures = {f"FID of {config}": scores["fid"] for config, scores in found.items()}
    for scores in found.values():  # the same for all of them
        figures |= {"FID of real images": scores["fid_real"], "FID of a Gaussian": scores["fid_gaussian"]}
    return figures


def flows(bench: Bench, seed: int) -> Figures:
    """Measure the FIDs of flows by coupling and Euler steps."""
    return _distances(bench, COUPLINGS, conditional=False)


def paths(bench: Bench, seed: int) -> Figures:
    """Measure the FIDs of conditional flows by coupling and Euler steps."""
    return _distances(bench, TOLD, conditional=True)


def _distances(bench: Bench, couplings: Mapping[str, str], *, conditional: bool) -> Figures:
    data, judge, _ = bench.reference
    found, _ = flow_distances(couplings, bench.scale, data, judge, bench.pictures, conditional=conditional)
    return {f"FID at {steps} Euler steps, {name}": at[steps] for name, at in found.items() for steps in STEPS}


ROWS: dict[str, ConfigRow] = {
    name: ConfigRow(f"cats and dogs, {what}", (name,), classifies(name), SEEDS)
    for name, what in {
        "perceptron": "perceptron",
        "mlp": "two layers",
        "lenet": "LeNet, cross-entropy",
        "lenet-least-squares": "LeNet, least squares",
    }.items()
}
ROWS |= {
    name: ConfigRow(f"cats and dogs, generator by {what}", (name,), generates(name))
    for name, what in {
        "transport-generator": "exact plans",
        "sinkhorn-generator": "Sinkhorn divergence",
        "sliced-generator": "sliced distance",
    }.items()
}
ROWS["biggan"] = ConfigRow("cats and dogs, BigGAN", ("biggan", "lenet"), asks("biggan", "lenet"))
ROWS |= {
    "lenet-fashion-mnist": ConfigRow(
        "Fashion-MNIST, LeNet, which judges the rows below",
        ("lenet-fashion-mnist",),
        lambda bench, seed: {"held-out accuracy": bench.reference[2]},
        judged=True,
    ),
    "resnet": ConfigRow("Fashion-MNIST, ResNet of 10 layers", ("resnet",), classifies("resnet")),
    "games": ConfigRow("Fashion-MNIST, generators against a critic", ADVERSARIES, games, judged=True),
    "one-step": ConfigRow(
        "Fashion-MNIST, one-step transport in features",
        ("features-fashion-mnist", "one-step"),
        one_step,
        judged=True,
    ),
    "flows": ConfigRow("Fashion-MNIST, flows along three couplings", ("flow",), flows, judged=True),
    "paths": ConfigRow("Fashion-MNIST, flows told the class", ("flow",), paths, judged=True),
}


def record(row: ConfigRow, bench: Bench) -> dict[str, Any]:
    """Run a row and return its record for JSON."""
    started = time.perf_counter()
    found = [row.run(bench, seed) for seed in (row.seeds[:1] if bench.quick else row.seeds)]
    return {
        "what": row.what,
        "by": row.by,
        "figures": {name: [figures[name] for figures in found] for name in found[0]},
        "quick": bench.quick,
        "seconds": round(time.perf_counter() - started, 1),
        "extractor": bench.reference[1].extractor.identity if row.judged else None,
    }


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Format records as a table: mean, minimum and maximum over seeds."""
    lines = ["| what | found | by |", "|---|---|---|"]
    for found in records:
        by = ", ".join(f"`configs/{config}.yaml`" for config in found["by"])
        for name, values in found["figures"].items():
            spread = f" ({min(values):.3g}–{max(values):.3g})" if len(values) > 1 else ""
            lines.append(f"| {found['what']}: {name} | {statistics.mean(values):.3g}{spread} | {by} |")
    told = [f"{found['what']}: judged by {found['extractor']}." for found in records if found["extractor"]]
    if any(found["quick"] for found in records):
        told.append("Of short runs on small images: figures that show that it works, and nothing else.")
    return "\n".join(lines) + "\n" + "".join(f"\n{text}\n" for text in told)


def keep(records: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Merge records into those of earlier runs, in the order of the table; return the table of all records."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "measured.json"
    found = (json.loads(path.read_text()) if path.is_file() else {}) | dict(records)
    merged = {name: found[name] for name in ROWS if name in found}
    path.write_text(json.dumps(merged, indent=1) + "\n")
    text = markdown(list(merged.values()))
    (folder / "measured.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images and short runs: shows that it works")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, help=f"folder of the results, {RESULTS.name}/ beside this file by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Figures of quick runs are not meaningful and are stored separately.
    folder = arguments.out or (HOME / "benchmarks" if arguments.quick else RESULTS)
    bench = Bench(arguments.quick, HOME / "benchmarks")
    for name in arguments.only:
        print(f"{name}: {ROWS[name].what}", flush=True)
        text = keep({name: record(ROWS[name], bench)}, folder)
    print(text)


if __name__ == "__main__":
    main()
