"""Time to recover from faults: ``python -m benchmarks.recovery [--quick] [--only WORD] [--json FILE]``.

Trains a generator and its critic on two workers of a separate platform. While the job trains, one part of the platform
after the other is killed with SIGKILL. Measures the seconds until the workers train again, from the latest checkpoint
if they were restarted. ``monge up`` restarts services immediately, which is part of the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.faults import FAULTS, GOES_ON, Fault, adversary, up
from benchmarks.report import Row, table, write_json
from services.jobs.client import Jobs
from services.jobs.documents import Event
from services.platform import local
from services.platform.processes import wait_until
from services.settings import Settings

LIMIT = 30.0
EVERY = 3_200
"""Number of images between two checkpoints: a few seconds."""

SLOWEST = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one worker, once")
    parser.add_argument("--only", default="", metavar="WORD", help="what has this in its name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    arguments = parser.parse_args()
    names = ["a worker"] if arguments.quick else [name for name in FAULTS if arguments.only in name]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "home"
        try:
            up(home)
            for name in names:
                seconds = [recovery(home, name, FAULTS[name]) for _ in range(1 if arguments.quick else 3)]
                rows.append(Row(f"killed: {name}", statistics.median(seconds), LIMIT, "limit", "s", 1.0))
                print(f"{rows[-1].name}: {', '.join(f'{one:.1f}' for one in seconds)} s", flush=True)
        finally:
            local.down(home, lambda _: None)
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


def recovery(home: Path, name: str, fault: Fault) -> float:
    """Measure the seconds from a fault until a job trains again; then cancel the job."""
    with Jobs(Settings(home=home)) as jobs:
        job = jobs.submit(adversary("endless", 10**9, EVERY)).id

        def images() -> int:
            progress = jobs.get(job).progress
            return 0 if progress is None else progress.images

        _require(wait_until(lambda: images() > 1.5 * EVERY, SLOWEST), f"{job} does not train")
        killed = time.time()
    fault(home)
    with Jobs(Settings(home=home)) as jobs:
        if name in GOES_ON:
            before = images()
            _require(wait_until(lambda: images() > before, SLOWEST), f"{job} does not train again")
            again = time.time()
        else:
            _require(wait_until(lambda: bool(_resumed(jobs.events(job), killed)), SLOWEST), f"{job} does not go on")
            again = _resumed(jobs.events(job), killed)[0]
        jobs.cancel(job)
        jobs.wait(job, SLOWEST)
    return again - killed


def _resumed(events: list[Event], since: float) -> list[float]:
    """Return the times at which training resumed from a checkpoint."""
    return [event.at.timestamp() for event in events if "from image" in event.text and event.at.timestamp() > since]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"{otherwise} within {SLOWEST:g} s; see `monge logs`")


if __name__ == "__main__":
    main()
