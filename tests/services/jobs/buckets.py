"""An S3 bucket for tests of the platform."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import boto3
from moto.server import ThreadedMotoServer


@dataclass
class Bucket:
    """A bucket ``shapes`` on a server that can be stopped."""

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
        """Return the environment variables of its clients."""
        return {
            "AWS_ACCESS_KEY_ID": "AKIDTEST",
            "AWS_SECRET_ACCESS_KEY": "hidden-key",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "MONGE_S3_ENDPOINT_URL": self.url,
            "MONGE_S3_REGION": "us-east-1",
            "MONGE_S3_PATH_STYLE": "1",
        }

    def leave(self) -> None:
        """Stop the server; this process keeps the stored objects."""
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
        """Compute the hash of all tensors of a job's last checkpoint."""
        last = max(key for key in self.keys(f"jobs/{job}/images-") if key.endswith("/state.json"))
        return f"{last.split('/')[2]} {json.loads(self.text(last))['sha256']}"
