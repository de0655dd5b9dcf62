"""Overhead of checkpoints and MLflow: ``python -m benchmarks.overhead [--quick] [--json FILE]``.

Trains ``configs/gan.yaml`` on Fashion-MNIST on two workers of a separate platform. Rank 0 measures the time in calls
that write checkpoints and points of curves, as a fraction of the time between its first and its last point; all ranks
wait for these calls.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import CHANGES, CONFIG, up
from benchmarks.report import Row, table, write_json
from pipelines.spec import JobSpec, load_spec
from services.cluster import join_cluster
from services.platform import local
from services.settings import Settings
from services.training.placement import Placement

LIMITS = {"checkpoints": 0.01, "points of curves in MLflow": 0.005}
"""Maximum fractions of the time of a run."""


def on_worker(carried: dict[str, Any]) -> dict[str, Any]:
    """Run a worker of a job and measure its calls."""
    from services.training import worker

    spent = dict.fromkeys(LIMITS, 0.0)
    at: list[float] = []

    def timed(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def method(*arguments: Any) -> None:
            started = time.perf_counter()
            call(*arguments)
            ended = time.perf_counter()
            if at:
                spent[name] += ended - started
            at.append(ended)

        return method

    listener = worker._Listener
    listener.metrics = timed("points of curves in MLflow", listener.metrics)  # type: ignore[method-assign]
    listener.checkpoint = timed("checkpoints", listener.checkpoint)  # type: ignore[method-assign]
    outcome = worker.train_worker(carried)
    return outcome | {"spent": spent, "seconds": at[-1] - at[0]}


def fractions(spec: JobSpec, home: Path) -> dict[str, float]:
    """Measure the fractions of a job's time by activity."""
    up(home)
    settings = Settings(home=home)
    join_cluster(settings, logs=False)
    # Both import Ray, which reads its environment at import.
    from services.sharding.dataset import dataset_address, shard_dataset
    from services.training import trainer

    address = dataset_address(home, spec.data)
    shard_dataset(spec.data, address, home / "cache", workers=0)
    trainer.on_worker = on_worker  # type: ignore[assignment, attr-defined]
    outcome = trainer.fit("overhead", spec, address, settings, Placement(spec.workers.count, gpu=False))
    return {name: seconds / outcome["seconds"] for name, seconds in outcome["spent"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images and a short run: shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    arguments = parser.parse_args()
    # Evaluations are not part of this measurement.
    changes = ["name=overhead", "workers.count=2", "train.evaluate_every=1000000000", "evaluation.samples=200"]
    if arguments.quick:
        changes = [*CHANGES, "name=overhead", "train.images=64000", "train.checkpoint_every=20000"]
    else:
        changes += ["train.images=120000", "train.checkpoint_every=20000"]
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "home"
        try:
            found = fractions(load_spec(CONFIG, changes), home)
        finally:
            local.down(home, lambda _: None)
    rows = [Row(name, 100 * found[name], 100 * limit, "limit", "% of the run", 1.0) for name, limit in LIMITS.items()]
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
