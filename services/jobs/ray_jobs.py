"""Ray Jobs over its REST API: what the controller asks of a cluster. Neither Ray nor torch is imported for it."""

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
"""Seconds for an answer."""


class EngineError(ServiceError):
    """The cluster is away, or answers what it should not."""


class RefusedError(EngineError):
    """The cluster has understood the request and does not want it."""


@dataclass(frozen=True)
class RayNode:
    """A machine of the cluster that is alive."""

    id: str
    address: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class RayStatus:
    """Where an attempt stands."""

    status: AttemptStatus
    message: str = ""


class RayJobs:
    """The dashboard of a Ray cluster.

    Args:
        dashboard: its URL.
        token: of the cluster, empty where it asks for none.
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
        """What the cluster has; a cluster that is away is one of the answers."""
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
            return Cluster(away=f"{self._url} is no Ray dashboard ({type(error).__name__})"), []
        cpus, gpus = (sum(node.resources.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
        return Cluster(cpus, gpus), nodes

    async def status(self, attempt: str) -> RayStatus:
        """Where an attempt stands.

        Raises:
            EngineError: the cluster is away.
        """
        try:
            document = await self._ask("GET", f"/api/jobs/{attempt}")
            return RayStatus(AttemptStatus(document["status"]), str(document.get("message") or ""))
        except RefusedError:
            return RayStatus(AttemptStatus.UNKNOWN)
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"of {attempt} the cluster says {error}") from error

    async def submit(self, attempt: str, entrypoint: str, metadata: Mapping[str, str]) -> None:
        """Start an attempt; one that the cluster knows already is not started again.

        Raises:
            RefusedError: the cluster will not have it.
            EngineError: the cluster is away.
        """
        body = {"submission_id": attempt, "entrypoint": entrypoint, "metadata": dict(metadata)}
        try:
            await self._ask("POST", "/api/jobs/", body)
        except EngineError:
            # The answer to an earlier request may have been lost.
            if (await self.status(attempt)).status is AttemptStatus.UNKNOWN:
                raise

    async def stop(self, attempt: str) -> None:
        """Ask an attempt's driver to end; Ray kills it some seconds later.

        Raises:
            EngineError: the cluster is away, or does not know it.
        """
        await self._ask("POST", f"/api/jobs/{attempt}/stop")

    async def log(self, attempt: str) -> str:
        """The whole log of an attempt.

        Raises:
            EngineError: the cluster is away, or does not know it.
        """
        return str((await self._ask("GET", f"/api/jobs/{attempt}/logs")).get("logs", ""))

    async def tail(self, attempt: str) -> AsyncIterator[str]:
        """The log of an attempt from its beginning, as it is written, until the attempt ends.

        Raises:
            EngineError: the cluster is away, or does not know it.
        """
        try:
            async with self._opened().ws_connect(
                f"{self._url}/api/jobs/{attempt}/logs/tail", headers=self._headers, heartbeat=30
            ) as socket:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        yield message.data
                if socket.close_code not in (1000, 1001, None):
                    raise EngineError(f"the log of {attempt} broke off: {socket.close_code}")
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
                    raise EngineError(f"{self._url} answers with status {answer.status}")
                document = json.loads(text)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise EngineError(_brief(error)) from error
        except ValueError as error:
            raise EngineError(f"{self._url} answers no JSON") from error
        if not isinstance(document, dict):
            raise EngineError(f"{self._url} answers {str(document)[:100]}")
        return document


def _brief(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
