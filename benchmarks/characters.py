"""Cartoon characters with known parts: ``python -m benchmarks.characters [--quick] [--only CONFIG …] [--json FILE]``.

Trains ``configs/characters.yaml``, one-step transport in the features of ``configs/features-characters.yaml``, and
``configs/biggan.yaml`` on the same images, each on one thread. A LeNet predicts whether a sample is of the requested
set, and attribute readers measure how many of the parts of training images the samples cover. Trained networks are
kept in ``.monge/benchmarks/`` and reused until their configs change.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.attributes import Examined, coverage, examine
from benchmarks.generators import CONFIGS, CPU, HOME, picture, shards, trained
from benchmarks.one_step import processes
from benchmarks.report import Row, table, write_json
from pipelines.evaluation.features import ClassifierFeatures
from pipelines.evaluation.figures import encode_png, image_grid
from pipelines.evaluation.generation import sample
from pipelines.evaluation.judging import FeatureJudge
from pipelines.models.bundle import Bundle, to_uint8
from pipelines.models.network import Generator, Network
from pipelines.spec import CharacterSet, CharactersSpec, JobSpec, TransportSpec, load_spec

ENCODER, JUDGE = "features-characters", "lenet"
GENERATORS = ("characters", "biggan")
ASKED, COVERED = 0.95, 0.9
"""Minimum fraction of samples of the requested set, and minimum fraction of covered parts."""

SAMPLES = 6_000
NAMED = 10
"""Maximum number of parts listed by name."""

ROWS, STEPS = 4, 6
"""Numbers of noise vectors, and of images from one set to the next (both included), in a picture of paths."""


def specified(config: str, quick: bool) -> JobSpec:
    """Return the spec of a config on characters, in one process."""
    data = load_spec(CONFIGS / f"{ENCODER}.yaml").data.model_dump(mode="json", exclude_defaults=True)
    if quick:
        data |= {"characters": data["characters"] | {"count": 600}}
    fields = [f"data={json.dumps(data)}", "workers.count=1", f"name=characters-by-{config}"]
    if quick:
        fields += ["train.images=256", "train.batch=64", "train.log_every=128"]
        fields += ["objective.pool=128"] if config == "characters" else []
    return load_spec(CONFIGS / f"{config}.yaml", fields)


def learn(config: str, quick: bool, folder: Path) -> float:
    """Train a config into a folder, unless it is there; return the CPU minutes, 0 if it was there."""
    torch.set_num_threads(1)
    spec = specified(config, quick)
    at = kept(spec, folder, quick)
    if at.exists():
        return 0.0
    data = shards(spec)
    networks: Mapping[str, Network] = {}
    if isinstance(spec.objective, TransportSpec):
        encoder = Bundle.load(kept(specified(ENCODER, quick), folder, quick)).network
        networks = dict.fromkeys(spec.objective.registered, encoder)
    began = time.process_time()
    network, _ = trained(spec, data, networks)
    taken = (time.process_time() - began) / 60
    # Written atomically, because a run can be interrupted.
    partial = at.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    Bundle(network, spec.model, data.image, data.classes).save(partial)
    partial.rename(at)
    return taken


def kept(spec: JobSpec, folder: Path, quick: bool) -> Path:
    """Return the path of the trained network of a spec; it depends on the spec and on the spec of its features."""
    digest = spec.fingerprint()
    if isinstance(spec.objective, TransportSpec):
        digest = hashlib.sha256((digest + specified(ENCODER, quick).fingerprint()).encode()).hexdigest()
    return folder / f"{spec.name}-{digest[:12]}"


def paths(bundle: Bundle, path: Path) -> None:
    """Draw paths between sets: each row has the same noise, and the requested set changes from one to the next."""
    between = [
        bundle.path(start, start + 1, STEPS, ROWS, seed=1).reshape(ROWS, STEPS, *bundle.image.dims)
        for start in range(len(bundle.classes) - 1)
    ]
    shown = np.concatenate([between[0], *(frames[:, 1:] for frames in between[1:])], axis=1)
    path.write_bytes(encode_png(image_grid(shown.reshape(-1, *bundle.image.dims), columns=shown.shape[1])))


def examined(name: CharacterSet, quick: bool) -> Examined:
    """Return a trained reader of the parts of one set."""
    torch.set_num_threads(1)
    learned, epochs = (200, 1) if quick else (12_000, 6)
    return examine(specified(ENCODER, quick).data, name, HOME / "cache", learned, epochs)


def judged(config: str, quick: bool, folder: Path, readers: Mapping[CharacterSet, Examined]) -> list[Row]:
    """Evaluate samples of a trained config; ``readers`` are by set, in the order of the classes."""
    torch.set_num_threads(1)
    spec = specified(config, quick)
    data = shards(spec)
    judge = ClassifierFeatures("judge", Bundle.load(kept(specified(JUDGE, quick), folder, quick)))
    bundle = Bundle.load(kept(spec, folder, quick))
    network = bundle.network.eval()
    assert isinstance(network, Generator)
    picture(network, folder / f"{spec.name}.png")
    paths(bundle, folder / f"{spec.name}-paths.png")
    count = 600 if quick else SAMPLES
    scores = FeatureJudge(judge, data.train, data.test, count, 0, classes=data.classes).scores(network)
    samples = to_uint8(sample(network, count, 0, CPU))
    rows = [
        Row(
            f"characters, {config}: samples of another set than asked",
            max(100 * (1 - scores["asked_class_share"]), 1e-2),
            100 * (1 - ASKED),
            "limit",
            "%",
            1.0,
        )
    ]
    covered = parts = 0
    for place, (name, reader) in enumerate(readers.items()):
        found = coverage(samples[place :: len(readers)], reader)
        print(
            f"  {config}, {name}: {found.covered} of {found.parts} parts; missing: {', '.join(found.missing) or 'none'}"
        )
        print(f"    {len(found.unread)} parts cannot be read: {', '.join(found.unread[:NAMED])}", flush=True)
        covered, parts = covered + found.covered, parts + found.parts
    missing = 100 * (1 - covered / max(parts, 1))
    rows.append(
        Row(f"characters, {config}: parts not seen", max(missing, 1e-2), 100 * (1 - COVERED), "limit", "%", 1.0)
    )
    rows.append(Row(f"characters, {config}", scores["fid"], scores["fid_gaussian"], "Gaussian", "FID", 1.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, short runs: shows that it works")
    parser.add_argument("--only", nargs="+", choices=GENERATORS, default=GENERATORS, help="configs to train")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    arguments = parser.parse_args()
    quick, folder = arguments.quick, HOME / "benchmarks"
    shards(specified(ENCODER, quick))
    with processes() as pool:
        first = [pool.submit(learn, config, quick, folder) for config in (ENCODER, JUDGE)]
        minutes = [run.result() for run in first]
        runs = [pool.submit(learn, config, quick, folder) for config in arguments.only]
        minutes += [run.result() for run in runs]
        for config, taken in zip((ENCODER, JUDGE, *arguments.only), minutes, strict=True):
            print(f"  {config}: {f'{taken:.1f} CPU minutes' if taken else 'trained before'}", flush=True)
        sets = (specified(ENCODER, quick).data.characters or CharactersSpec()).sets
        readers = dict(zip(sets, pool.map(examined, sets, itertools.repeat(quick)), strict=True))
        found = [pool.submit(judged, config, quick, folder, readers) for config in arguments.only]
        rows = [row for run in found for row in run.result()]
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
