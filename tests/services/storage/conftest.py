from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from services.settings import Settings
from services.storage.objects import Storage
from services.storage.open import open_storage
from tests.services.storage.faults import FaultyServer


@pytest.fixture(scope="session")
def moto_port() -> Iterator[int]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set keys in the environment, and ignore the configuration of the machine."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-key")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@pytest.fixture
def server(moto_port: int, keys: None) -> Iterator[FaultyServer]:
    """Run a faulty server with an empty bucket ``images``."""
    with FaultyServer(moto_port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1")
        client.create_bucket(Bucket="images")
        for entry in client.list_objects_v2(Bucket="images").get("Contents", ()):
            client.delete_object(Bucket="images", Key=entry["Key"])
        server.requests = 0
        yield server
        server.ended.set()
        server.shutdown()
        thread.join(30)


@pytest.fixture
def settings(server: FaultyServer) -> Settings:
    return Settings(s3_endpoint_url=server.url, s3_region="us-east-1", s3_path_style=True, s3_timeout=5, s3_attempts=2)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Storage:
    return open_storage("s3://images/some/prefix/" if request.param == "s3" else str(tmp_path / "root"), settings)
