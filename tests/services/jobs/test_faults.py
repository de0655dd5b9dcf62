"""What becomes of a job whose processes die, stop or are cut off, one kind of fault after the other.

Run by ``make test-faults``: each takes a minute or two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.jobs.client import Jobs
from services.jobs.states import State
from services.platform.processes import wait_until
from services.settings import Settings
from tests.services.jobs.living import (
    Monge,
    adversary,
    bits,
    checkpointed,
    draw_shapes,
    platform,
    submitted,
    workers,
)

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def monge(home: Path) -> Iterator[Monge]:
    with platform(home, {"MONGE_RANK_DEADLINE": "40"}) as run:
        yield run


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def uninterrupted(monge: Monge, shapes: Path, home: Path) -> str:
    """The bits of a job that nothing happens to."""
    return bits(home, submitted(monge("submit", *adversary("whole", shapes), "--follow")))


def _ends(home: Path, job: str) -> str:
    """Wait until a job has succeeded; its log."""
    with Jobs(Settings(home=home)) as jobs:
        ended = jobs.wait(job, timeout=400)
        assert ended.state is State.SUCCEEDED, ended.reason
        return "\n".join(event.text for event in jobs.events(job))


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
    assert _ends(home, job).count("the workers could not be started") + _attempts(home, job) > 1
    assert bits(home, job) == uninterrupted


def test_a_worker_that_is_stopped_is_found_and_all_start_again(
    monge: Monge, home: Path, shapes: Path, uninterrupted: str
) -> None:
    job = submitted(monge("submit", *adversary("stopped", shapes)))
    assert wait_until(lambda: checkpointed(home, job), timeout=180, interval=0.05)
    stopped = workers(home)[1]
    stopped.suspend()
    told = _ends(home, job)
    assert not stopped.is_running()
    assert re.search(r"rank \d: RankError: rank \d was lost or came too late", told)
    assert bits(home, job) == uninterrupted
    log = monge("logs", job)
    print(log)
    seen = re.findall(r"rank (\d) was after step \d+, .*, seen (\d+) s ago", log)
    assert {rank for rank, _ in seen} == {"0", "1"}
    assert max(int(silent) for _, silent in seen) >= 30
    assert log.count("loop.py") >= 2
