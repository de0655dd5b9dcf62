"""One way to reach MLflow: short timeouts, no telemetry, one kind of error.

MLflow takes seconds to import, so nothing here imports it before it is needed.
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
    # MLflow's own defaults hold a caller for minutes when the server is down; whoever can wait retries itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def quiet_environment() -> dict[str, str]:
    """The environment variables under which MLflow runs in Monge, as far as the user has not set them."""
    return {name: value for name, value in _DEFAULTS.items() if name not in os.environ}


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and registry at ``uri``; nothing is sent yet.

    Args:
        uri: ``http://host:port`` of a server, or ``sqlite:///file`` of a store on this machine.
    """
    os.environ.update(quiet_environment())
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def mlflow_errors(uri: str, purpose: str) -> Iterator[None]:
    """Turn whatever MLflow raises into a :class:`ServiceError` that says what was being done.

    Raises:
        ServiceError: the block failed in MLflow, on the way to it or in its store.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException, OSError) as error:
        hint = "see that the MLflow server runs (`monge status`)" if can_retry_call(error) else None
        raise ServiceError(f"MLflow at {uri} could not {purpose}: {brief(error)}", hint=hint) from error


def status_code(error: BaseException) -> int:
    """The HTTP status that an error of MLflow or of requests stands for; 503 where no answer came."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    if isinstance(error, RequestException) and error.response is not None:
        return error.response.status_code
    return 503


def can_retry_call(error: BaseException) -> bool:
    """Whether the same call may succeed later: the server is away or overloaded, not the request wrong.

    Args:
        error: of MLflow, of the way to it, or of :func:`mlflow_errors`, which knows its cause.
    """
    from requests import RequestException

    if isinstance(error, ServiceError):
        return error.__cause__ is not None and can_retry_call(error.__cause__)
    if isinstance(error, OSError) and not isinstance(error, RequestException | ConnectionError | TimeoutError):
        return False  # of this machine's disk
    return status_code(error) >= 500 or status_code(error) in (408, 429)


def brief(error: BaseException) -> str:
    """The first line of an error; MLflow appends whole stack traces."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def metric_name(name: str) -> str:
    """A name that MLflow takes for a metric: characters that it does not take become ``_``."""
    return re.sub(r"[^/\w.\- :]", "_", name)
