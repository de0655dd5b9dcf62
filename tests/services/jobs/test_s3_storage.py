"""A platform whose data sets, checkpoints and marks of attempts lie in S3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from services.jobs.client import Jobs
from services.jobs.states import State
from services.platform.processes import wait_until
from services.settings import Settings
from tests.services.jobs.living import Monge, adversary, draw_shapes, platform, submitted, workers

LOST = "what was kept before stays"
"""Told of a checkpoint that could not be stored."""

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]


@dataclass
class Bucket:
    """A bucket ``shapes`` of a server that can be away."""

    server: ThreadedMotoServer = field(default_factory=lambda: ThreadedMotoServer("127.0.0.1", 0, verbose=False))

    def __post_init__(self) -> None:
        self.server.start()
        self.port = self.server.get_host_and_port()[1]
        keys = {"aws_access_key_id": "AKIDTEST", "aws_secret_access_key": "hidden-key"}
        self.client: Any = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)
        self.client.create_bucket(Bucket="shapes")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "AKIDTEST",
            "AWS_SECRET_ACCESS_KEY": "hidden-key",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "MONGE_STORAGE": "s3://shapes/ours",
            "MONGE_S3_ENDPOINT_URL": self.url,
            "MONGE_S3_REGION": "us-east-1",
            "MONGE_S3_PATH_STYLE": "1",
            "MONGE_S3_ATTEMPTS": "2",
        }

    def leave(self) -> None:
        """Be away; what is stored is kept in this process."""
        self.server.stop()

    def come_back(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()

    def keys(self, prefix: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket="shapes", Prefix=f"ours/{prefix}").get("Contents", ())
        return [entry["Key"].removeprefix("ours/") for entry in found]

    def text(self, key: str) -> str:
        return str(self.client.get_object(Bucket="shapes", Key=f"ours/{key}")["Body"].read().decode())

    def checkpointed(self, job: str) -> bool:
        snapshot = f"jobs/{job}/checkpoint_manager_snapshot.json"
        return snapshot in self.keys(f"jobs/{job}/") and '"images-' in self.text(snapshot)

    def bits(self, job: str) -> str:
        """The hash of all tensors of a job's last checkpoint."""
        last = max(key for key in self.keys(f"jobs/{job}/images-") if key.endswith("/state.json"))
        return f"{last.split('/')[2]} {json.loads(self.text(last))['sha256']}"


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
    with platform(home, bucket.environment) as run:
        yield run


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def uninterrupted(monge: Monge, shapes: Path) -> str:
    """The id of a job that nothing happens to."""
    return submitted(monge("submit", *adversary("whole", shapes), "--follow"))


def _ends(home: Path, job: str) -> str:
    """Wait until a job has succeeded; its story."""
    with Jobs(Settings(home=home)) as jobs:
        ended = jobs.wait(job, timeout=400)
        story = "\n".join(event.text for event in jobs.events(job))
        assert ended.state is State.SUCCEEDED, f"{ended.reason}\n{story}"
        return story


def test_a_job_whose_worker_is_killed_goes_on_from_s3(
    monge: Monge, home: Path, bucket: Bucket, shapes: Path, uninterrupted: str
) -> None:
    job = submitted(monge("submit", *adversary("killed", shapes)))
    assert wait_until(lambda: bucket.checkpointed(job), timeout=180, interval=0.05)
    workers(home)[0].kill()
    assert "from image" in _ends(home, job)
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
    assert f"{uninterrupted}@7 is not kept" in refused


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
    story = _ends(home, job)
    assert LOST in story
    assert bucket.bits(job) == bucket.bits(uninterrupted)
    assert "hidden-key" not in monge("logs", job)
