"""pyarrow file systems for folders and S3, used by Ray Train for checkpoints."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from botocore.credentials import RefreshableCredentials
from botocore.exceptions import PartialCredentialsError, ProfileNotFound
from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, LocalFileSystem, S3FileSystem

from pipelines.errors import StorageError
from services.settings import Settings
from services.storage.objects import SCHEME
from services.storage.s3 import S3Storage, no_keys, session_of


def open_files(address: str, settings: Settings) -> tuple[FileSystem, str]:
    """Return a file system and the path in it for an address.

    Args:
        address: path of a folder, or ``s3://bucket/prefix``.
        settings: settings of S3.

    Raises:
        StorageError: no keys for S3 are found.
    """
    if not address.startswith(SCHEME):
        return LocalFileSystem(), address
    return S3Files(settings), address.removeprefix(SCHEME)


@contextmanager
def s3_errors(settings: Settings, purpose: str) -> Iterator[None]:
    """Convert pyarrow's errors of S3 into :class:`StorageError`; errors of a disk stay :class:`OSError`.

    Args:
        settings: settings with the address of the storage.
        purpose: participle for the message "checkpoints cannot be {purpose}".
    """
    try:
        yield
    except OSError as error:
        if settings.storage is None:
            raise
        # Do not include the server's message: it may quote the request, including keys.
        told = f"{settings.storage}: checkpoints cannot be {purpose}: {type(error).__name__}"
        raise StorageError(told, hint="check that the server is reachable") from error


class S3Files(S3FileSystem):  # type: ignore[misc]
    """S3 with the settings and with the keys that boto3 finds.

    Its pickle contains no keys: another process finds them itself.

    Raises:
        StorageError: no keys are found.
    """

    def __init__(self, settings: Settings) -> None:
        self._known = {name: value for name, value in settings.model_dump().items() if name.startswith("s3_")}
        super().__init__(**_options(settings))

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self._known,)


def _made(known: dict[str, Any]) -> S3Files:
    return S3Files(Settings(**known))


def _options(settings: Settings) -> dict[str, Any]:
    try:
        session = session_of(settings)
        credentials = session.get_credentials()
        # boto3 reads endpoint and region from more places.
        meta = S3Storage("", "", settings).client.meta
    except (PartialCredentialsError, ProfileNotFound):
        credentials = None
    if credentials is None:
        raise no_keys("checkpoints")
    endpoint = urlsplit(meta.endpoint_url)
    is_amazon = (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    options: dict[str, Any] = {
        "region": None if meta.region_name == "aws-global" else meta.region_name,
        "scheme": endpoint.scheme,
        "endpoint_override": None if is_amazon else endpoint.netloc,
        "force_virtual_addressing": not settings.s3_path_style and not _is_number(endpoint.hostname or ""),
        "connect_timeout": settings.s3_timeout,
        "request_timeout": settings.s3_timeout,
        "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=settings.s3_attempts),
        "tls_ca_file_path": os.environ.get("AWS_CA_BUNDLE"),
    }
    if isinstance(credentials, RefreshableCredentials) and settings.s3_profile is None:
        return options  # keys of an instance role expire; pyarrow finds and renews them itself
    keys = credentials.get_frozen_credentials()
    return options | {"access_key": keys.access_key, "secret_key": keys.secret_key, "session_token": keys.token}


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
