"""Addresses, limits and folders, from the environment.

Every field is read from ``MONGE_<FIELD>``, as in ``MONGE_HOME=/data/monge``. Addresses that are not given are those
of the platform that ``monge up`` started in this home; it writes them to ``platform.json`` there.
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
"""File of the home folder that names the storage in S3."""

_STORAGE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?!\.{1,2}(/|$))[^/\s]+)*/?", re.ASCII)


class Settings(BaseSettings):
    """What a process needs to know of the others.

    Attributes:
        home: folder of everything that Monge writes.
        storage: ``s3://bucket/prefix`` of data sets, checkpoints and marks of attempts; the home folder by default.
        ray_address: of the Ray cluster's head, ``host:port``.
        ray_dashboard: URL of its dashboard, where jobs are submitted.
        mlflow_uri: URL of the MLflow server.
        transport_url: URL of the transport service.
        endpoint_url: URL of the model endpoint.
        jobs_url: URL of the job service.
        token: that our servers ask for; the one in ``token`` of the home folder by default.
        jobs_store: the job service's database, as SQLAlchemy names it; SQLite in the home folder by default.
        jobs_running: most jobs that run at a time.
        job_python: the Python that runs jobs; the cluster's own by default.
        mlflow_public_uri: where people open the MLflow UI, for links; ``mlflow_uri`` by default.
        max_request_mib: size limit of a request to any of our servers.
        max_image_pixels: size limit of an image given to the endpoint.
        max_generate: most samples that one request may ask for.
        serving_device: where the endpoint's networks run; ``auto``: on a GPU if there is one.
        plan_deadline: seconds that a rank waits for the other ranks and for its plan.
        rank_deadline: seconds that a rank waits for the others anywhere else; one that comes later ends the attempt.
        shard_cache: folder on local disk for the shards of data sets in S3; ``cache/shards`` of the home by default.
        shard_cache_gib: how much it may hold; the least recently used shards make room.
        s3_endpoint_url: URL of the S3 server; boto3's own choice by default, as are the region and the profile.
        s3_region: its region.
        s3_profile: the profile of boto3's configuration files that holds the keys.
        s3_path_style: whether the bucket is named in the path instead of the host, as servers on one address need.
        s3_timeout: seconds that a connection to S3 may take, and that it may be silent.
        s3_attempts: times that a request to S3 is made before it counts as failed.
        s3_retry_mode: botocore's: ``standard`` backs off, ``adaptive`` also slows down the requests that follow.
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
            held = "; keys are given in the environment or in a profile" if "@" in address else ""
            raise ValueError(f"an address s3://bucket or s3://bucket/prefix expected{held}")
        return address and address.rstrip("/")

    @property
    def shards(self) -> Path:
        """Folder of shards that were fetched."""
        return (self.shard_cache or self.home / "cache" / "shards").absolute()

    @property
    def secret(self) -> str | None:
        """The token for our servers; None where there is none."""
        if self.token is not None:
            return self.token.get_secret_value()
        try:
            return (self.home / "token").read_text().strip() or None
        except OSError:
            return None

    def for_workers(self) -> dict[str, Any]:
        """What :class:`Settings` takes in a process elsewhere, which has another working directory and environment."""
        known = self.model_dump(mode="json", exclude={"token", "jobs_store"})
        return known | {"home": str(self.home.absolute()), "shard_cache": str(self.shards)}

    @cached_property
    def platform(self) -> dict[str, Any]:
        """What ``monge up`` wrote down of the processes it started; empty when there is no local platform."""
        try:
            return dict(json.loads((self.home / "platform.json").read_text()))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ServiceError(
                f"{self.home / 'platform.json'} is damaged: {error}", hint="run `monge down`, then `monge up`"
            ) from None

    def address(self, field: str) -> str:
        """The address of a service: from the environment, else from the local platform.

        Args:
            field: the name of the setting, as ``jobs_url``.

        Raises:
            ServiceError: neither knows it.
        """
        address = getattr(self, field) or self.platform.get(field)
        if not address:
            raise ServiceError(
                f"{field}: no address is known and no platform runs in {self.home}",
                hint=f"run `monge up`, or set MONGE_{field.upper()}",
            )
        return str(address)


def kept_storage(home: Path) -> str | None:
    """The storage in S3 that ``monge up`` was started with in a home; None where there is none."""
    try:
        return (home / STORAGE).read_text().strip() or None
    except OSError:
        return None


def load_settings() -> Settings:
    """Settings from the environment of this process, and the storage that the home's platform was started with.

    Raises:
        SpecError: an environment variable has a value that does not fit.
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
    # What stands before an @ in an address is a secret.
    return "" if "@" in str(value) else f" (received {value!r})"
