"""Jobs whose processes die, stop or lose their network, one kind of fault per test.

Run by ``make test-faults``: each takes a minute or two.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.faults import bits, kill
from services.jobs.client import Jobs
from services.platform.local import Platform
from services.platform.processes import wait_until
from services.settings import Settings
from services.tracking.connection import connect
from services.training.fencing import Fence
from tests.services.jobs.living import (
    Monge,
    adversary,
    checkpointed,
    ends,
    family,
    platform,
    submitted,
    title,
    transported,
    went_on,
    workers,
)

BALLOON = """
import sys, time
held = bytearray(int(sys.argv[1]))
held[::4096] = b"x" * len(held[::4096])
time.sleep(600)
"""
"""Script that allocates and holds the given number of bytes."""

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def monge(home: Path) -> Iterator[Monge]:
    with platform(home, {"MONGE_RANK_DEADLINE": "40"}) as run:
        yield run


@pytest.fixture(scope="module")
def uninterrupted(monge: Monge, shapes: Path, home: Path) -> str:
    """Run a job without faults; return the hash of its tensors."""
    return bits(home, submitted(monge("submit", *adversary("whole", shapes), "--follow")))


def _attempts(home: Path, job: str) -> int:
    with Jobs(Settings(home=home)) as jobs:
        return jobs.get(job).attempts


def test_workers_that_die_while_they_start_are_started_again(
    monge: Monge, home: Path, shapes: Path, uninterrupted: str
) -> None:
    job = submitted(monge("submit", *adversary("starting", shapes)))
    for _ in range(2):
        assert wait_until(lambda: len(workers(home)) == 2, timeout=120, interval=0.02)
        for worker in (dead := workers(home)):
            worker.kill()
        psutil.wait_procs(dead, timeout=30)
    assert ends(home, job).count("the workers failed to start") + _attempts(home, job) > 1
    assert bits(home, job) == uninterrupted


def test_a_worker_that_is_stopped_is_found_and_all_start_again(
    monge: Monge, home: Path, shapes: Path, uninterrupted: str
) -> None:
    job = submitted(monge("submit", *adversary("stopped", shapes)))
    assert wait_until(lambda: checkpointed(home, job), timeout=180, interval=0.05)
    stopped = workers(home)[1]
    stopped.suspend()
    told = ends(home, job)
    assert not stopped.is_running()
    assert re.search(r"rank \d: RankError: rank \d was lost or came too late", told)
    assert bits(home, job) == uninterrupted
    log = monge("logs", job)
    seen = re.findall(r"rank (\d) was after step \d+, .*, seen (\d+) s ago", log)
    assert {rank for rank, _ in seen} == {"0", "1"}
    assert max(int(silent) for _, silent in seen) >= 30
    assert log.count("loop.py") >= 2


def test_the_transport_service_may_die_under_a_job(monge: Monge, home: Path, shapes: Path) -> None:
    """Each step needs a plan: workers wait for the actors and continue without another attempt."""
    twin = submitted(monge("submit", *transported("planned", shapes), "--follow"))
    job = submitted(monge("submit", *transported("unplanned", shapes)))
    face = Platform.read(home).processes["transport"].process()
    assert face is not None
    kill(face)
    for images in (3_000, 9_500):
        with Jobs(Settings(home=home)) as jobs:
            assert wait_until(lambda beyond=images: went_on(jobs, job, 0, beyond), timeout=180)
        replicas = workers(home, "TransportActor")
        assert replicas
        for replica in replicas:
            replica.kill()
    ends(home, job)
    assert _attempts(home, job) == 1
    assert bits(home, job) == bits(home, twin)
    monge("up", "--cpus", "2")


def test_an_attempt_that_was_given_up_changes_nothing(monge: Monge, home: Path, shapes: Path) -> None:
    job = submitted(monge("submit", *adversary("fenced", shapes)))
    assert wait_until(lambda: checkpointed(home, job), timeout=180, interval=0.05)
    (driver,) = [one for one in family(home) if f"services.jobs.driver --job {job}" in title(one)]
    driver.suspend()  # it has lost its network, and the cluster gives it up
    controllers, dead = workers(home, "TrainController"), workers(home)
    Fence(str(home / "jobs"), job, 2, Settings(home=home)).claim()
    with Jobs(Settings(home=home)) as jobs:
        assert wait_until(lambda: not any(one.is_running() for one in dead), timeout=120)
        before = sorted(path.name for path in (home / "jobs" / job).glob("images-*"))
        driver.resume()
        psutil.wait_procs([driver, *controllers], timeout=60)
        assert sorted(path.name for path in (home / "jobs" / job).glob("images-*")) == before
        assert "attempt 1 was superseded by attempt 2" in monge("logs", job)
        run_id = jobs.get(job).run_id
    assert run_id is not None
    assert connect(Settings(home=home).address("mlflow_uri")).get_run(run_id).info.status == "RUNNING"


def test_workers_that_are_killed_for_memory_are_started_again(
    tmp_path_factory: pytest.TempPathFactory, shapes: Path, uninterrupted: str
) -> None:
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + (6 << 30)) / memory.total
    if limit > 0.9:
        pytest.skip("the machine has less than 8 GiB to spare")
    with platform(other := tmp_path_factory.mktemp("tight"), {"RAY_memory_usage_threshold": f"{limit:.3f}"}) as run:
        job = submitted(run("submit", *adversary("hungry", shapes)))
        assert wait_until(lambda: checkpointed(other, job), timeout=180, interval=0.05)
        dead = workers(other)
        with subprocess.Popen([sys.executable, "-c", BALLOON, str(7 << 30)]) as balloon:
            try:
                assert wait_until(lambda: not all(one.is_running() for one in dead), timeout=60, interval=0.05)
            finally:
                balloon.kill()
        told = ends(other, job)
        print(told)
        assert "memory" in told
        assert bits(other, job) == uninterrupted


def test_the_whole_machine_may_die_at_any_moment(monge: Monge, home: Path, shapes: Path, uninterrupted: str) -> None:
    """Covers the start of a job, its training and the registration of its model, with another job in the queue."""
    job = submitted(monge("submit", *adversary("crashed", shapes)))
    behind = submitted(monge("submit", *adversary("behind", shapes)))
    ports = (home / "ports.json").read_text()
    moments = (
        lambda: len(workers(home)) == 2,
        lambda: checkpointed(home, job),
        lambda: "registering" in _log(home, job),
    )
    for moment in moments:
        assert wait_until(moment, timeout=240, interval=0.02)
        for started in Platform.read(home).processes.values():
            if process := started.process():
                kill(process)
        monge("up", "--cpus", "2")
    for one in (job, behind):
        ends(home, one)
        assert bits(home, one) == uninterrupted
    assert (home / "ports.json").read_text() == ports
    assert monge("status").count("answers") == 5
    versions = connect(Settings(home=home).address("mlflow_uri")).search_model_versions("name = 'crashed'")
    assert [version.run_id for version in versions].count(versions[0].run_id) == len(versions)


def _log(home: Path, job: str) -> str:
    files = (file for file in (home / "jobservice" / "logs").rglob("*") if job in str(file) and file.is_file())
    return "".join(file.read_text() for file in files)
