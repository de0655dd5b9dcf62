"""Cost of starting a job: ``python -m benchmarks.starting [--quick] [--json FILE]``.

Measures the CPU seconds of all processes from ``monge submit`` until two workers train, on a separate platform where
the data set is already sharded. The peer is two plain processes that import torch, connect over gloo and run one step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.report import Row, table, write_json
from services.jobs.client import Jobs
from services.jobs.states import State
from services.platform import local
from services.platform.processes import free_port, wait_until
from services.settings import Settings

CONFIG = Path(__file__).parents[1] / "configs" / "perceptron.yaml"
CHANGES = ["--set", "data.source=digits", "--set", "workers.count=2"]
BAR = 1 / 2.5
SLOWEST = 120.0
"""Timeout in seconds for a job that does not start to train."""

STAGES = (
    ("monge submit", ("services.cli submit", "services.jobs.plan")),
    ("driver", ("services.jobs.driver", "ray::JobSupervisor")),
    ("Ray Train", ("ray::TrainController", "ray::SynchronizationActor", "ray::_Autoscaling", "ray::PlacementGroup")),
    ("workers", ("ray::RayTrainWorker",)),
)
"""Names of stages, and substrings of the command lines of their processes."""

BARE = """
import torch, torch.distributed as dist, sys
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 10))
optimizer = torch.optim.AdamW(network.parameters())
torch.nn.functional.cross_entropy(network(torch.randn(32, 64)), torch.randint(0, 10, (32,))).backward()
optimizer.step()
dist.destroy_process_group()
"""


class Usage:
    """CPU seconds of a set of processes, including those that end during the measurement.

    Args:
        processes: returns the current processes.
    """

    def __init__(self, processes: Callable[[], Sequence[psutil.Process]]) -> None:
        self._processes = processes
        self._seconds: dict[tuple[int, float], float] = {}
        self._names: dict[tuple[int, float], str] = {}
        self.look()
        self._before = dict(self._seconds)

    def look(self) -> None:
        """Sample each process once; CPU time after the last sample of a process is not counted."""
        for process in self._processes():
            try:
                key, times = (process.pid, process.create_time()), process.cpu_times()
                self._seconds[key] = times.user + times.system
                self._names[key] = " ".join(process.cmdline()) or self._names.get(key, "")
            except psutil.Error:
                continue

    def by_stage(self) -> dict[str, float]:
        """Return the CPU seconds since the start, by stage."""
        used: dict[str, float] = defaultdict(float)
        for key, seconds in self._seconds.items():
            name = self._names.get(key, "")
            stage = next((stage for stage, marks in STAGES if any(mark in name for mark in marks)), "services and Ray")
            used[stage] += seconds - self._before.get(key, 0.0)
        return used


def start_of_a_job(home: Path) -> dict[str, float]:
    """Measure the CPU seconds until the workers of a job train, by stage; then cancel the job."""
    usage = Usage(lambda: _processes(home))
    with Jobs(Settings(home=home)) as jobs:
        known = {job.id for job in jobs.find()}
        command = [sys.executable, "-m", "services.cli", "submit", str(CONFIG), *CHANGES]
        submitting = subprocess.Popen(command, env={**os.environ, "MONGE_HOME": str(home)}, stdout=subprocess.DEVNULL)

        def trains() -> bool:
            usage.look()
            return any(job.id not in known and job.state is State.RUNNING for job in jobs.find(limit=1))

        if not wait_until(trains, SLOWEST) or submitting.wait():
            sys.exit(f"the job did not train within {SLOWEST:g} s; see `monge logs`")
        usage.look()
        (job,) = jobs.find(limit=1)
        jobs.cancel(job.id)
        jobs.wait(job.id, SLOWEST)
    return usage.by_stage()


def bare_start() -> float:
    """Measure the CPU seconds of two plain processes from start to end."""
    before, port = os.times(), str(free_port())
    processes = [subprocess.Popen([sys.executable, "-c", BARE, str(rank), port]) for rank in range(2)]
    if any(process.wait(120) for process in processes):
        sys.exit("the bare processes failed")
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one start in place of five")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    arguments = parser.parse_args()
    repeats = 1 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "home"
        try:
            local.up(home, _unsaid)
            start_of_a_job(home)  # creates the shards and Ray's first processes
            ours, bare = [], []
            for _ in range(repeats):
                ours.append(start_of_a_job(home))
                bare.append(bare_start())
        finally:
            local.down(home, _unsaid)
    peer = statistics.median(bare)
    rows = [_row("from monge submit to the first step", [sum(used.values()) for used in ours], peer, BAR)]
    for stage in sorted({stage for used in ours for stage in used}):
        rows.append(_row(f"  of it: {stage}", [used[stage] for used in ours], peer, 0.0))
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)


def _row(name: str, seconds: Sequence[float], peer: float, bar: float) -> Row:
    return Row(name, statistics.median(seconds), peer, "bare gloo, 2 processes", "s", bar)


def _processes(home: Path) -> list[psutil.Process]:
    """Return the children of this process, and the processes of the platform with their children."""
    found = psutil.Process().children(recursive=True)
    for started in local.Platform.read(home).processes.values():
        with suppress(psutil.NoSuchProcess):
            if (process := started.process()) is not None:
                found += [process, *process.children(recursive=True)]
    return found


def _unsaid(_: str) -> None:
    pass


if __name__ == "__main__":
    main()
