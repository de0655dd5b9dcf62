"""Client of the Ray Jobs REST API, used by the controller. Imports neither Ray nor torch."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from pipelines.errors import ServiceError
from services.jobs.policy import Cluster
from services.jobs.states import AttemptStatus

SECONDS = 10.0
"""Timeout of a request in seconds."""


class EngineError(ServiceError):
    """The cluster is unreachable or sends an invalid response."""


class RefusedError(EngineError):
    """The cluster rejects the request."""


@dataclass(frozen=True)
class RayNode:
    """A node of the cluster that is alive."""

    id: str
    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class RayStatus:
    """Status of an attempt."""

    status: AttemptStatus
    message: str = ""


class RayJobs:
    """Client of the dashboard of a Ray cluster.

    Args:
        dashboard: URL of the dashboard.
        token: token of the cluster; empty if it requires none.
    """

    def __init__(self, dashboard: str, token: str = "") -> None:
        self._url = dashboard.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def look(self) -> tuple[Cluster, list[RayNode]]:
        """Return the resources and the nodes of the cluster; an unreachable cluster is a valid result."""
        try:
            document = await self._ask("GET", "/api/v0/nodes?detail=1&limit=10000")
            rows = document["data"]["result"]["result"]
            nodes = [
                RayNode(str(row["node_id"]), str(row["node_ip"]), dict(row.get("resources_total") or {}))
                for row in rows
                if row["state"] == "ALIVE"
            ]
        except EngineError as error:
            return Cluster(away=str(error)), []
        except (LookupError, TypeError, ValueError) as error:
            return Cluster(away=f"{self._url} is not a Ray dashboard ({type(error).__name__})"), []
        cpus, gpus = (sum(node.resources.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
        return Cluster(cpus, gpus), nodes

    async def status(self, attempt: str) -> RayStatus:
        """Return the status of an attempt.

        Raises:
            EngineError: the cluster is unreachable.
        """
        try:
            document = await self._ask("GET", f"/api/jobs/{attempt}")
            return RayStatus(AttemptStatus(document["status"]), str(document.get("message") or ""))
        except RefusedError:
            return RayStatus(AttemptStatus.UNKNOWN)
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"invalid status of {attempt} from the cluster: {error}") from error

    async def submit(self, attempt: str, entrypoint: str, metadata: Mapping[str, str]) -> None:
        """Start an attempt. Has no effect if the cluster already knows it.

        Raises:
            RefusedError: the cluster rejects the attempt.
            EngineError: the cluster is unreachable.
        """
        body = {"submission_id": attempt, "entrypoint": entrypoint, "metadata": dict(metadata)}
        try:
            await self._ask("POST", "/api/jobs/", body)
        except EngineError:
            # The response to an earlier request may have been lost.
            if (await self.status(attempt)).status is AttemptStatus.UNKNOWN:
                raise

    async def stop(self, attempt: str) -> None:
        """Ask the driver of an attempt to stop; Ray kills it after some seconds.

        Raises:
            EngineError: the cluster is unreachable or does not know the attempt.
        """
        await self._ask("POST", f"/api/jobs/{attempt}/stop")

    async def log(self, attempt: str) -> str:
        """Return the whole log of an attempt.

        Raises:
            EngineError: the cluster is unreachable or does not know the attempt.
        """
        return str((await self._ask("GET", f"/api/jobs/{attempt}/logs")).get("logs", ""))

    async def tail(self, attempt: str) -> AsyncIterator[str]:
        """Yield the log of an attempt from its beginning, as it is written, until the attempt ends.

        Raises:
            EngineError: the cluster is unreachable or does not know the attempt.
        """
        try:
            async with self._opened().ws_connect(
                f"{self._url}/api/jobs/{attempt}/logs/tail", headers=self._headers, heartbeat=30
            ) as socket:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        yield message.data
                if socket.close_code not in (1000, 1001, None):
                    raise EngineError(f"the log of {attempt} was closed with code {socket.close_code}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineError(_brief(error)) from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SECONDS))
        return self._session

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            async with self._opened().request(method, self._url + path, json=body, headers=self._headers) as answer:
                text = await answer.text()
                if answer.status in (400, 404):
                    raise RefusedError(text.strip().splitlines()[-1][:500] if text.strip() else str(answer.status))
                if answer.status != 200:
                    raise EngineError(f"{self._url} responded with status {answer.status}")
                document = json.loads(text)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise EngineError(_brief(error)) from error
        except ValueError as error:
            raise EngineError(f"{self._url} did not send JSON") from error
        if not isinstance(document, dict):
            raise EngineError(f"{self._url} sent {str(document)[:100]}")
        return document


def _brief(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
