"""A platform with data sets, checkpoints and attempt markers in S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.jobs.client import Jobs
from services.platform.processes import wait_until
from services.settings import Settings
from tests.services.jobs.buckets import Bucket
from tests.services.jobs.living import Monge, adversary, ends, platform, submitted, workers

LOST = "earlier checkpoints are kept"
"""Part of the message about a checkpoint that could not be stored."""

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    bucket = Bucket()
    yield bucket
    bucket.server.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def monge(home: Path, bucket: Bucket) -> Iterator[Monge]:
    storage = {"MONGE_STORAGE": "s3://shapes/ours", "MONGE_S3_ATTEMPTS": "2"}
    with platform(home, bucket.environment | storage) as run:
        yield run


@pytest.fixture(scope="module")
def uninterrupted(monge: Monge, shapes: Path) -> str:
    """Run a job without faults; return its id."""
    return submitted(monge("submit", *adversary("whole", shapes), "--follow"))


def test_a_job_whose_worker_is_killed_goes_on_from_s3(
    monge: Monge, home: Path, bucket: Bucket, shapes: Path, uninterrupted: str
) -> None:
    job = submitted(monge("submit", *adversary("killed", shapes)))
    assert wait_until(lambda: bucket.checkpointed(job), timeout=180, interval=0.05)
    workers(home)[0].kill()
    assert "from image" in ends(home, job)
    assert bucket.bits(job) == bucket.bits(uninterrupted)
    assert f"jobs/{job}/attempts/1" in bucket.keys(f"jobs/{job}/attempts/")
    assert any(key.endswith("/manifest.json") for key in bucket.keys("data/"))
    assert not (home / "jobs" / job).exists()
    assert not (home / "data").exists()
    assert not list((home / "jobs" / ".staging").glob("*"))
    assert "hidden-key" not in monge("logs", job)


def test_a_job_begins_with_a_checkpoint_in_s3(monge: Monge, bucket: Bucket, shapes: Path, uninterrupted: str) -> None:
    told = monge("submit", *adversary("more", shapes, "train.images=26000"), "--from", uninterrupted, "--follow")
    assert f"of {uninterrupted}" in told
    assert "from image 24,000" in told
    refused = monge("submit", *adversary("less", shapes), "--from", f"{uninterrupted}@7", fails=True)
    assert f"{uninterrupted}@7 does not exist" in refused


def test_training_goes_on_while_s3_is_away(
    monge: Monge, home: Path, bucket: Bucket, shapes: Path, uninterrupted: str
) -> None:
    job = submitted(monge("submit", *adversary("alone", shapes)))
    assert wait_until(lambda: bucket.checkpointed(job), timeout=180, interval=0.05)
    bucket.leave()
    try:
        with Jobs(Settings(home=home)) as jobs:
            assert wait_until(lambda: any(LOST in event.text for event in jobs.events(job)), timeout=120, interval=0.2)
    finally:
        bucket.come_back()
    story = ends(home, job)
    assert LOST in story
    assert bucket.bits(job) == bucket.bits(uninterrupted)
    assert "hidden-key" not in monge("logs", job)
