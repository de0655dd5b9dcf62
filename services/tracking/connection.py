"""Connection to MLflow: short timeouts, no telemetry, one error class.

MLflow takes seconds to import; this module imports it on first use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.errors import ServiceError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's defaults block for minutes if the server is down; callers that can wait retry themselves.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def quiet_environment() -> dict[str, str]:
    """Return the environment variables for MLflow, without those that are already set."""
    return {name: value for name, value in _DEFAULTS.items() if name not in os.environ}


def connect(uri: str) -> MlflowClient:
    """Return a client of the tracking server and registry at ``uri``, without sending a request.

    Args:
        uri: ``http://host:port`` of a server, or ``sqlite:///file`` of a store on this machine.
    """
    os.environ.update(quiet_environment())
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def mlflow_errors(uri: str, purpose: str) -> Iterator[None]:
    """Convert errors of MLflow into a :class:`ServiceError` that names the operation.

    Raises:
        ServiceError: MLflow, its store or the connection failed.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException, OSError) as error:
        hint = "check that the MLflow server is running (`monge status`)" if can_retry_call(error) else None
        raise ServiceError(f"MLflow at {uri} could not {purpose}: {brief(error)}", hint=hint) from error


def status_code(error: BaseException) -> int:
    """Return the HTTP status of an error of MLflow or of requests; 503 if there was no response."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    if isinstance(error, RequestException) and error.response is not None:
        return error.response.status_code
    return 503


def can_retry_call(error: BaseException) -> bool:
    """Return whether the same call may succeed later, because the server is unreachable or overloaded.

    Args:
        error: error of MLflow, of the connection, or from :func:`mlflow_errors`.
    """
    from requests import RequestException

    if isinstance(error, ServiceError):
        return error.__cause__ is not None and can_retry_call(error.__cause__)
    if isinstance(error, OSError) and not isinstance(error, RequestException | ConnectionError | TimeoutError):
        return False  # an error of the local disk
    return status_code(error) >= 500 or status_code(error) in (408, 429)


def brief(error: BaseException) -> str:
    """Return the first line of an error; MLflow appends stack traces."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def metric_name(name: str) -> str:
    """Return a valid MLflow metric name: invalid characters become ``_``."""
    return re.sub(r"[^/\w.\- :]", "_", name)
