"""Jobs during a network failure between two machines: for seconds, for longer, and until a machine is lost.

Packets are dropped on both ends of the link, without an error for the senders.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.faults import bits
from services.jobs.client import Jobs
from services.jobs.documents import JobDetails
from services.jobs.states import State
from services.platform.processes import wait_until
from services.settings import Settings
from tests.services.jobs.living import adversary, checkpointed, submitted, title
from tests.services.platform.machines import ADDRESSES, Machines, two_machines

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Run a platform on one machine and a node on the other, with one CPU each."""
    home = tmp_path_factory.mktemp("cut") / "home"
    with two_machines(home) as machines:
        try:
            machines.cut()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"packets cannot be dropped here: {getattr(error, 'stderr', None) or error}")
        machines.mend()
        machines.monge(0, "up", "--host", ADDRESSES[0], "--cpus", "1")
        machines.start(1, "node", "join", f"http://{ADDRESSES[0]}:8200", "--cpus", "1")
        assert wait_until(lambda: len(machines.nodes()) == 1, timeout=90)
        yield machines


@pytest.fixture(scope="module")
def uninterrupted(machines: Machines, shapes: Path) -> str:
    """Run a job without faults; return the hash of its tensors."""
    return bits(machines.home, submitted(machines.monge(0, "submit", *adversary("whole", shapes), "--follow")))


def _look(machines: Machines, job: str) -> JobDetails:
    with machines.inside(0), Jobs(Settings(home=machines.home)) as jobs:
        return jobs.get(job)


def _cut(machines: Machines, shapes: Path, name: str) -> str:
    """Submit a job, and cut the link after its first checkpoint."""
    job = submitted(machines.monge(0, "submit", *adversary(name, shapes)))
    assert wait_until(lambda: checkpointed(machines.home, job), timeout=180, interval=0.05)
    machines.cut()
    _say(f"{job} is cut")
    return job


def _ends(machines: Machines, job: str) -> str:
    """Wait until a job has succeeded; return its log."""
    with machines.inside(0), Jobs(Settings(home=machines.home)) as jobs:
        ended = jobs.wait(job, timeout=400)
        told = "\n".join(f"{event.at} {event.text}" for event in jobs.events(job))
    _say(f"{job} ended\n{told}")
    assert ended.state is State.SUCCEEDED, ended.reason
    return told


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


@pytest.mark.parametrize("seconds", [5, 20])
def test_a_short_cut_is_waited_out(machines: Machines, shapes: Path, uninterrupted: str, seconds: int) -> None:
    """TCP retransmits lost packets, and Ray does not close the connections."""
    job = _cut(machines, shapes, f"cut-{seconds}")
    time.sleep(seconds)
    machines.mend()
    told = _ends(machines, job)
    assert "start again" not in told
    assert _look(machines, job).attempts == 1
    assert bits(machines.home, job) == uninterrupted


@pytest.mark.parametrize("raylet_ends", [False, True], ids=["until-the-job-waits", "until-the-node-has-ended"])
def test_a_job_waits_for_a_lost_machine_and_goes_on_by_itself(
    machines: Machines, shapes: Path, uninterrupted: str, raylet_ends: bool
) -> None:
    """The node joins again, whether it was told that it is considered dead or has ended before."""
    (lost,) = machines.nodes()
    job = _cut(machines, shapes, "lost")
    processes = {kind: _processes(machines, kind) for kind in ("raylet", "RayTrainWorker")}
    assert len(processes["RayTrainWorker"]) == 1

    def waits() -> bool:
        seen = _look(machines, job)
        return seen.state is State.RECOVERING and seen.reason.endswith("waiting for nodes")

    assert wait_until(waits, timeout=240)
    waiting = _look(machines, job)
    _say(f"{waiting.state} after {waiting.attempts} attempts: {waiting.reason}")
    assert waiting.reason.startswith("attempt 1 ended: ")
    assert "; 2 CPUs requested, the cluster has 1: waiting for nodes" in waiting.reason
    kept = _checkpoints(machines, job)
    if raylet_ends:
        assert wait_until(lambda: not any(one.is_running() for one in processes["raylet"]), timeout=300)
        _say("the raylet that was cut off has ended")
    assert _look(machines, job).attempts == 1

    machines.mend()
    _say("the link is back")
    assert wait_until(lambda: any(name != lost for name in machines.nodes()), timeout=120)
    _say("the node is back")
    # What was cut off is gone before the next attempt trains, and has written nothing.
    assert not any(one.is_running() for found in processes.values() for one in found)
    assert _checkpoints(machines, job) == kept
    told = _ends(machines, job)
    assert "from image" in told
    assert _look(machines, job).attempts == 2
    assert bits(machines.home, job) == uninterrupted


def _processes(machines: Machines, kind: str) -> list[psutil.Process]:
    """Return the processes of the second machine whose name or command line contains a word."""
    return [one for one in machines.alive(1) if kind in title(one)]


def _checkpoints(machines: Machines, job: str) -> dict[str, int]:
    """Return the modification time in ns of each file of the job's checkpoints."""
    folder = machines.home / "jobs" / job
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("images-*/**/*") if path.is_file()}
