"""Mode coverage with a thousand modes: ``python -m benchmarks.modes [--quick] [--images N] [--json FILE]``.

The three channels of an image are three digits (Metz et al. 2017, "Unrolled generative adversarial networks", for
MNIST; here scikit-learn's digits). ``configs/one-step.yaml`` is trained on such images, in features that
``configs/features-fashion-mnist.yaml`` learns from them, on one thread; a LeNet classifies the digits of the samples.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.generators import CONFIGS, CPU, HOME, picture, shards, trained
from benchmarks.report import Row, table, write_json
from pipelines.data.arrays import map_arrays
from pipelines.data.catalogue import fetch
from pipelines.evaluation.classification import accuracy
from pipelines.evaluation.generation import sample
from pipelines.models.bundle import to_float, to_uint8
from pipelines.models.network import Classifier, Generator
from pipelines.spec import JobSpec, load_spec

SIDE, STACKED = 16, 30_000
MODES, BAR = 1000, 950
SAMPLES = 26_000
"""Number of samples, as is usual for this test."""

SHOWN = 0.2
"""A mode counts as found if its frequency in samples is at least this fraction of the average over all modes: the
reader misclassifies some digits, so single samples of a mode can belong to another one."""

FEATURES = (
    "{network: pixels, weight: 0.5}",
    "{network: fashion-mnist-features, layer: 1}",
    "{network: fashion-mnist-features}",
)


def stacked(cache: Path, count: int) -> Path:
    """Create an .npz file with images of three digits each, (count, 8, 8, 3), and their first digits as labels."""
    arrays = map_arrays(fetch("digits", cache))
    images, labels = arrays["images"][..., 0], arrays["labels"]
    chosen = np.random.default_rng(0).integers(0, len(images), (count, 3))
    path = cache / f"stacked-digits-{count}.npz"
    np.savez(path, images=images[chosen].transpose(0, 2, 3, 1), labels=labels[chosen[:, 0]])
    return path


def modes(generator: Generator, reader: Classifier, count: int) -> tuple[int, int]:
    """Count the triples of digits that are read in enough samples, and in at least one."""
    images = to_uint8(sample(generator, count, 0, CPU))
    with torch.no_grad():
        digits = [
            torch.cat([reader(to_float(block)).argmax(1) for block in images[:, channel : channel + 1].split(1000)])
            for channel in range(3)
        ]
    times = torch.bincount(100 * digits[0] + 10 * digits[1] + digits[2], minlength=MODES)
    return int((times >= SHOWN * count / MODES).sum()), int((times > 0).sum())


def specified(config: str, source: object, images: int, *more: str) -> JobSpec:
    """Return the spec of a config on such images, in one process."""
    data = (f"data.source={source}", f"data.size={SIDE}", "workers.count=1")
    length = {"images": images, "log_every": max(images // 5, 1)}
    return load_spec(CONFIGS / f"{config}.yaml", [*data, *(f"train.{k}={v}" for k, v in length.items()), *more])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short runs: shows that it works")
    parser.add_argument("--images", type=int, default=300_000, help="that the generator sees")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.set_num_threads(1)
    cache = HOME / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    of_digits = specified("lenet-fashion-mnist", "digits", 1_280 if quick else 60_000)
    digits = shards(of_digits)
    reader, _ = trained(of_digits, digits)
    right = accuracy(reader, digits.test, CPU)["accuracy"]
    source = stacked(cache, 1_000 if quick else STACKED)
    of_features = specified("features-fashion-mnist", source, 1_280 if quick else 100_000, "data.channels=3")
    data = shards(of_features)
    encoder, _ = trained(of_features, data)
    images = 1_280 if quick else arguments.images
    fields = (
        "data.channels=3",
        f"objective.features=[{', '.join(FEATURES)}]",
        f"train.ema_half_life={max(images // 20, 1)}",
    )
    spec = specified("one-step", source, images, *fields)
    began = time.process_time()
    network, _ = trained(spec, data, {"fashion-mnist-features": encoder})
    minutes = (time.process_time() - began) / 60
    assert isinstance(network, Generator)
    picture(network, HOME / "benchmarks" / "stacked-digits.png")
    found, seen = modes(network, reader, 2_000 if quick else SAMPLES)
    print(f"  {found} modes after {minutes:.1f} CPU minutes; {seen} if a single sample were enough")
    print(f"  the reader is right about {right:.3f} of held-out digits")
    missing, allowed = max(MODES - found, 0.1), MODES - BAR
    rows = [Row("one step: modes of 1,000 that are missing", missing, allowed, "limit", "modes", 1.0)]
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
