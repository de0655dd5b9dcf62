"""Storage in S3 and compatible servers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.exceptions import (
    ConnectionError as NoConnectionError,
)

from pipelines.errors import ObjectNotFoundError, StorageError
from services.settings import Settings
from services.storage.objects import PAGE, READ_LIMIT, StoredObject, changed_error, check_key, check_range, too_large

Result = TypeVar("Result")

_CUT = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
"""Errors that interrupt a body: botocore retries a request until the headers arrive, but not the body."""

_BACK_OFF = (0.1, 5.0)
"""Seconds before the second read of a body, doubled each time, and the upper bound."""

_CONNECTIONS = 32
"""Maximum number of concurrent requests of a process."""

_ACCESS = "check the keys (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MONGE_S3_PROFILE), and their permissions"
_REGION = "set MONGE_S3_REGION to the bucket's region"
_ABSENT = "check the name and MONGE_S3_ENDPOINT_URL"
_ANSWER = "check MONGE_S3_ENDPOINT_URL and the server, or raise MONGE_S3_TIMEOUT or MONGE_S3_ATTEMPTS"


HURRY, TRIES = 10.0, 2
"""Read timeout in seconds and number of tries for requests on which other processes wait."""


def hurried(settings: Settings) -> Settings:
    """Return the settings for requests that must succeed or fail soon."""
    hurry = {"s3_timeout": min(settings.s3_timeout, HURRY), "s3_attempts": min(settings.s3_attempts, TRIES)}
    return settings.model_copy(update=hurry)


def session_of(settings: Settings) -> boto3.Session:
    """Return the boto3 session, which finds keys and region."""
    return boto3.Session(profile_name=settings.s3_profile, region_name=settings.s3_region)


def no_keys(name: str) -> StorageError:
    """Return the error for missing keys."""
    return StorageError(f"{name}: no keys for S3 found", hint=_ACCESS)


def require_credentials(address: str, settings: Settings) -> None:
    """Raise if there are no keys; does not check their permissions.

    Raises:
        StorageError: boto3 finds no keys.
    """
    try:
        if session_of(settings).get_credentials() is None:
            raise no_keys(address)
    except (PartialCredentialsError, ProfileNotFound):
        raise no_keys(address) from None


@dataclass(frozen=True)
class S3Storage:
    """Objects of a bucket below a prefix.

    Can be pickled; the other process finds the keys itself, through boto3's chain: environment, profile or instance
    role.

    Attributes:
        bucket: name of the bucket.
        prefix: prefix without a slash at its ends; empty for the whole bucket.
        settings: settings of endpoint, region, profile, path style, timeouts, retries.
    """

    bucket: str
    prefix: str
    settings: Settings

    @property
    def address(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "client"}

    @cached_property
    def client(self) -> Any:
        """boto3's client, created on first use; threads may share it."""
        settings = self.settings
        config = Config(
            connect_timeout=settings.s3_timeout,
            read_timeout=settings.s3_timeout,
            retries={"mode": settings.s3_retry_mode, "total_max_attempts": settings.s3_attempts},
            max_pool_connections=_CONNECTIONS,
            s3={"addressing_style": "path" if settings.s3_path_style else "auto"},
            # Not all compatible servers support the newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return session_of(settings).client("s3", endpoint_url=settings.s3_endpoint_url, config=config)

    def pages(self, prefix: str = "") -> Iterator[list[StoredObject]]:
        root = f"{self.prefix}/" if self.prefix else ""
        after: dict[str, str] = {}

        def ask() -> Any:
            return self.client.list_objects_v2(Bucket=self.bucket, Prefix=root + prefix, MaxKeys=PAGE, **after)

        while True:
            page = self._ask(prefix, ask)
            found = [
                StoredObject(entry["Key"].removeprefix(root), entry["Size"], entry["ETag"].strip('"'))
                for entry in page.get("Contents", ())
                # Consoles create an empty object named "folder/" for a folder.
                if not entry["Key"].endswith("/")
            ]
            if found:
                yield found
            if not page.get("IsTruncated"):
                return
            after = {"ContinuationToken": page["NextContinuationToken"]}

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        data = self._read(key, limit + 1)
        if len(data) > limit:
            raise too_large(self._name(key), limit)
        return data

    def read_range(self, key: str, start: int, stop: int, version: str | None = None) -> bytes:
        check_range(start, stop)
        pin = {} if version is None else {"IfMatch": f'"{version}"'}
        try:
            return self._read(key, stop - start, Range=f"bytes={start}-{stop - 1}", **pin)
        except _PastEndError:
            return b""

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        self._ask(key, lambda: self.client.put_object(Bucket=self.bucket, Key=path, Body=data))

    def delete(self, key: str) -> None:
        path = self._path(key)
        self._ask(key, lambda: self.client.delete_object(Bucket=self.bucket, Key=path))

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except ObjectNotFoundError:
            return False
        return True

    def size(self, key: str) -> int:
        path = self._path(key)
        return int(self._ask(key, lambda: self.client.head_object(Bucket=self.bucket, Key=path))["ContentLength"])

    def _read(self, key: str, count: int, **options: str) -> bytes:
        path = self._path(key)

        def read() -> bytes:
            for attempt in range(self.settings.s3_attempts):
                answer = self.client.get_object(Bucket=self.bucket, Key=path, **options)
                expected = min(count, answer["ContentLength"])
                try:
                    with closing(answer["Body"]) as body:
                        data = bytes(body.read(count))
                    if len(data) < expected:
                        raise IncompleteReadError(actual_bytes=len(data), expected_bytes=expected)
                    return data
                except _CUT:
                    if attempt == self.settings.s3_attempts - 1:
                        raise
                first, most = _BACK_OFF
                time.sleep(min(most, first * 2**attempt) * random.uniform(0.5, 1))
            raise AssertionError("there is at least one attempt")

        return self._ask(key, read)

    def _path(self, key: str) -> str:
        return f"{self.prefix}/{check_key(key)}" if self.prefix else check_key(key)

    def _name(self, key: str) -> str:
        return f"{self.address}/{key}".rstrip("/")

    def _ask(self, key: str, request: Callable[[], Result]) -> Result:
        # Messages of boto3 and of servers may quote the request, including keys: do not include them.
        try:
            return request()
        except ClientError as error:
            raise self._refused(self._name(key), error) from None
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound):
            raise no_keys(self._name(key)) from None
        except (NoConnectionError, HTTPClientError, *_CUT) as error:
            what = f"no complete response in {self.settings.s3_attempts} attempts ({type(error).__name__})"
            raise StorageError(f"{self._name(key)}: {what}", hint=_ANSWER) from None
        except (BotoCoreError, ValueError) as error:
            what = f"the request is invalid ({type(error).__name__})"
            raise StorageError(f"{self._name(key)}: {what}", hint="check the bucket's name and MONGE_S3_*") from None

    def _refused(self, name: str, error: ClientError) -> StorageError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            return ObjectNotFoundError(f"{name}: bucket {self.bucket!r} not found", hint=_ABSENT)
        if status == 404:
            return ObjectNotFoundError(f"{name}: object not found", hint=_ABSENT)
        if status == 412:
            return changed_error(name)
        if status == 416:
            return _PastEndError(f"{name}: the range starts after the end of the object")
        if status in (301, 307) or code == "AuthorizationHeaderMalformed":
            return StorageError(f"{name}: the bucket is in another region", hint=_REGION)
        if status in (401, 403):
            return StorageError(f"{name}: access is denied (HTTP {status} {code})", hint=_ACCESS)
        if status >= 500 or status == 429:
            attempts = self.settings.s3_attempts
            return StorageError(f"{name}: the server failed {attempts} times (HTTP {status} {code})", hint=_ANSWER)
        return StorageError(f"{name}: the server rejects the request (HTTP {status} {code})", hint="check MONGE_S3_*")


class _PastEndError(StorageError):
    """A range starts after the end of its object."""
