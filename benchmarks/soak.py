"""Half an hour of random kills: ``python -m benchmarks.soak [--quick] [--minutes M] [--seed N] [--json FILE]``.

Trains three generators with their critics, one after the other on two workers. Every few seconds, a part of the
platform is killed with SIGKILL: workers, drivers, Ray Train's controller, the Ray head, MLflow, the job service, the
transport service, the whole machine. Each job must end with the same bits and curves as an undisturbed twin, and no
process, temporary file or port may remain.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.faults import FAULTS, adversary, bits, curves, left_over, up
from pipelines.errors import ServiceError
from pipelines.spec import JobSpec
from services.jobs.client import Jobs
from services.jobs.states import State
from services.platform import local
from services.settings import Settings

RATE = 2_700
"""Approximate images per second of such a job on two processors; determines the length of the jobs."""

KILLED_EVERY = (15.0, 45.0)
"""Minimum and maximum seconds between two kills."""

TRAINING_FRACTION = 0.35
"""Fraction of the total time that the jobs would take without faults."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short job and a worker's death")
    parser.add_argument("--minutes", type=float, default=30.0, help="of kills, about")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    arguments = parser.parse_args()
    count = 1 if arguments.quick else 3
    images = 38_400 if arguments.quick else int(arguments.minutes * 60 * TRAINING_FRACTION * RATE / count) // 64 * 64
    kinds = ["a worker"] if arguments.quick else list(FAULTS)
    specs = [adversary(f"soak-{index}", images, max(1_600, images // 40), f"seed={index}") for index in range(count)]
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "home"
        up(home)
        try:
            twins = [_result(home, _submit(home, spec)) for spec in specs]
            figures = endure(home, specs, kinds, random.Random(arguments.seed))
        finally:
            ports = json.loads((home / "ports.json").read_text())
            local.down(home, lambda _: None)
        figures["left over"] = left_over(home, ports)
    for job, twin in zip(figures["jobs"], twins, strict=True):
        job["same bits"], job["same curves"] = job.pop("bits") == twin["bits"], job.pop("curves") == twin["curves"]
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    whole = all(job["state"] == "succeeded" and job["same bits"] and job["same curves"] for job in figures["jobs"])
    sys.exit(0 if whole and not figures["left over"] else 1)


def endure(home: Path, specs: list[JobSpec], kinds: list[str], chance: random.Random) -> dict[str, Any]:
    """Inject random faults until all jobs end; return their results."""
    jobs = [_submit(home, spec) for spec in specs]
    began, killed = time.time(), Counter[str]()
    while True:
        time.sleep(chance.uniform(*KILLED_EVERY))
        if _over(home, jobs):
            break
        kind = chance.choice(kinds)
        print(f"{time.time() - began:6.0f} s: {kind}", flush=True)
        FAULTS[kind](home)
        killed[kind] += 1
    minutes = (time.time() - began) / 60
    return {"minutes": round(minutes, 1), "killed": dict(killed), "jobs": [_result(home, job) for job in jobs]}


def _submit(home: Path, spec: JobSpec) -> str:
    with Jobs(Settings(home=home)) as jobs:
        return jobs.submit(spec).id


def _over(home: Path, names: list[str]) -> bool:
    with suppress(ServiceError), Jobs(Settings(home=home)) as jobs:
        return all(jobs.get(name).state.final for name in names)
    return False


def _result(home: Path, name: str) -> dict[str, Any]:
    """Return the result of a job: the hash of all its tensors, the points of its curves, and its effort."""
    with Jobs(Settings(home=home)) as jobs:
        ended = jobs.wait(name, timeout=3600)
    succeeded = ended.state is State.SUCCEEDED
    assert ended.started is not None
    assert ended.ended is not None
    return {
        "state": ended.state.value,
        "reason": ended.reason,
        "attempts": ended.attempts,
        "seconds": round((ended.ended - ended.started).total_seconds()),
        "bits": bits(home, name) if succeeded else None,
        "curves": curves(home, name) if succeeded else None,
    }


if __name__ == "__main__":
    main()
