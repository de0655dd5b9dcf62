"""Settings of a process, read from the environment: addresses, limits and folders.

Each field is read from ``MONGE_<FIELD>``, for example ``MONGE_HOME=/data/monge``. Addresses that are not set are read
from ``platform.json`` in the home folder, which ``monge up`` writes.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipelines.errors import ServiceError, SpecError

NAMESPACE = "monge"
"""Ray namespace of all named actors."""

LOOPBACK = "127.0.0.1"

STORAGE = "storage"
"""File in the home folder that holds the S3 address of the storage."""

_STORAGE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?!\.{1,2}(/|$))[^/\s]+)*/?", re.ASCII)


class Settings(BaseSettings):
    """Addresses, limits and folders of a process.

    Attributes:
        home: folder of all files that Monge writes.
        storage: S3 address ``s3://bucket/prefix`` of data sets, checkpoints and marks of attempts; by default ``home``.
        ray_address: address of the head node of the Ray cluster, as ``host:port``.
        ray_dashboard: URL of the Ray dashboard, to which jobs are submitted.
        mlflow_uri: URL of the MLflow server.
        transport_url: URL of the transport service.
        endpoint_url: URL of the model endpoint.
        jobs_url: URL of the job service.
        token: token for the servers of Monge; by default the content of ``token`` in the home folder.
        jobs_store: SQLAlchemy URL of the job service's database; by default SQLite in the home folder.
        jobs_running: maximum number of jobs that run at the same time.
        job_python: path of the Python that runs jobs; by default that of the cluster.
        mlflow_public_uri: URL of the MLflow UI for links; by default ``mlflow_uri``.
        max_request_mib: maximum size of a request to any server, in MiB.
        max_image_pixels: maximum size of an image sent to the endpoint, in pixels.
        max_generate: maximum number of samples per request.
        serving_device: device of the endpoint's networks; ``auto`` uses a GPU if there is one.
        plan_deadline: seconds that a rank waits for the shares of the other ranks and for its plan.
        rank_deadline: seconds that a rank waits for the others in other collective operations; then the attempt ends.
        shard_cache: folder on local disk for shards fetched from S3; by default ``cache/shards`` in the home folder.
        shard_cache_gib: maximum size of that folder in GiB; the least recently used shards are evicted.
        s3_endpoint_url: URL of the S3 server; by default that of boto3.
        s3_region: region of the S3 server; by default that of boto3.
        s3_profile: boto3 profile that holds the keys; by default that of boto3.
        s3_path_style: whether the bucket is part of the path instead of the host name, as some S3 servers require.
        s3_timeout: timeout of connecting to S3 and of each read, in seconds.
        s3_attempts: maximum number of tries of a request to S3.
        s3_retry_mode: retry mode of botocore: ``standard`` backs off, ``adaptive`` also throttles later requests.
    """

    model_config = SettingsConfigDict(env_prefix="MONGE_", frozen=True, hide_input_in_errors=True)

    home: Path = Path(".monge")
    storage: str | None = None
    ray_address: str | None = None
    ray_dashboard: str | None = None
    mlflow_uri: str | None = None
    transport_url: str | None = None
    endpoint_url: str | None = None
    jobs_url: str | None = None
    token: SecretStr | None = None
    jobs_store: str | None = None
    jobs_running: int = Field(default=64, ge=1)
    job_python: str | None = None
    mlflow_public_uri: str | None = None
    max_request_mib: float = 64
    max_image_pixels: int = 16_777_216
    max_generate: int = 1024
    serving_device: Literal["auto", "cpu", "cuda"] = "auto"
    plan_deadline: float = 60
    rank_deadline: float = Field(default=300, gt=0)
    shard_cache: Path | None = None
    shard_cache_gib: float = Field(default=20.0, gt=0)
    s3_endpoint_url: str | None = None
    s3_region: str | None = None
    s3_profile: str | None = None
    s3_path_style: bool = False
    s3_timeout: float = Field(default=30.0, gt=0)
    s3_attempts: int = Field(default=5, ge=1)
    s3_retry_mode: Literal["standard", "adaptive"] = "standard"

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, address: str | None) -> str | None:
        if address is not None and not _STORAGE.fullmatch(address):
            held = "; pass keys in the environment or in a profile" if "@" in address else ""
            raise ValueError(f"expected s3://bucket or s3://bucket/prefix{held}")
        return address and address.rstrip("/")

    @property
    def shards(self) -> Path:
        """Folder of shards fetched from S3."""
        return (self.shard_cache or self.home / "cache" / "shards").absolute()

    @property
    def secret(self) -> str | None:
        """Token for the servers of Monge; None if there is none."""
        if self.token is not None:
            return self.token.get_secret_value()
        try:
            return (self.home / "token").read_text().strip() or None
        except OSError:
            return None

    def for_workers(self) -> dict[str, Any]:
        """Return the arguments of :class:`Settings` for a process with another working directory and environment."""
        known = self.model_dump(mode="json", exclude={"token", "jobs_store"})
        return known | {"home": str(self.home.absolute()), "shard_cache": str(self.shards)}

    @cached_property
    def platform(self) -> dict[str, Any]:
        """Addresses and processes written by ``monge up``; empty if no local platform is running."""
        try:
            return dict(json.loads((self.home / "platform.json").read_text()))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ServiceError(
                f"{self.home / 'platform.json'} is damaged: {error}", hint="run `monge down`, then `monge up`"
            ) from None

    def address(self, field: str) -> str:
        """Return the address of a service from the environment, else from the local platform.

        Args:
            field: name of the setting, such as ``jobs_url``.

        Raises:
            ServiceError: the address is not set, and no local platform is running.
        """
        address = getattr(self, field) or self.platform.get(field)
        if not address:
            raise ServiceError(
                f"no platform is running in {self.home} and {field} is not set",
                hint=f"run `monge up`, or set MONGE_{field.upper()}",
            )
        return str(address)


def kept_storage(home: Path) -> str | None:
    """Return the S3 storage that ``monge up`` was started with in a home folder; None if there is none."""
    try:
        return (home / STORAGE).read_text().strip() or None
    except OSError:
        return None


def load_settings() -> Settings:
    """Return the settings from the environment, with the storage of the local platform.

    Raises:
        SpecError: an environment variable has an invalid value.
    """
    try:
        settings = Settings()
        if settings.storage is None and (kept := kept_storage(settings.home)):
            settings = Settings(storage=kept)
        return settings
    except ValidationError as error:
        faults = [f"MONGE_{str(e['loc'][0]).upper()}: {e['msg']}{_received(e['input'])}" for e in error.errors()]
        raise SpecError("\n".join(faults)) from None


def _received(value: object) -> str:
    # The part of an address before @ is a secret.
    return "" if "@" in str(value) else f" (received {value!r})"
