"""The nodes of the cluster, read from Ray's dashboard, and draining of nodes. Does not import Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import httpx

from pipelines.errors import ConflictError, ServiceError, SpecError
from services.cluster import ray_environment, read_token
from services.jobs.documents import NodeUse
from services.settings import Settings
from services.tokens import authorization

SECONDS = 15.0
"""Timeout of a request to the dashboard in seconds."""

DRAIN_SECONDS = 60.0
"""Timeout of the drain command in seconds; the command imports Ray."""

DEADLINE = 600
"""Seconds after which Ray stops the node even if work still runs on it."""


class Nodes:
    """The nodes of one cluster.

    Args:
        settings: settings with the addresses of the head and the dashboard.
        transport: httpx transport, for tests.
    """

    def __init__(self, settings: Settings, transport: httpx.BaseTransport | None = None) -> None:
        self._settings = settings
        self._client = httpx.Client(
            base_url=settings.address("ray_dashboard").rstrip("/"),
            headers=authorization(read_token(settings.home)),
            timeout=SECONDS,
            trust_env=False,
            transport=transport,
        )

    def all(self) -> list[NodeUse]:
        """Return the nodes that are alive, the head first, then by address.

        Raises:
            ServiceError: the cluster is unreachable.
        """
        try:
            rows = [row["raylet"] for row in self._ask("/nodes?view=summary")["summary"] if "nodeId" in row["raylet"]]
            report = self._ask("/api/cluster_status")["clusterStatus"].get("loadMetricsReport") or {}
            # Autoscalers of clusters with a variable number of nodes omit this.
            used = report.get("usageByNode") or {}
            found = [_node(row, used.get(row["nodeId"])) for row in rows if row["state"] == "ALIVE"]
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ServiceError(f"the dashboard sent an invalid list of nodes: {error!r}") from error
        return sorted(found, key=lambda node: (not node.head, node.address))

    def drain(self, name: str, by: str) -> NodeUse:
        """Drain a node: nothing new is placed on it, and its work is asked to stop.

        Args:
            name: address of the node, or a prefix of its id.
            by: name of the user, for Ray's log.

        Raises:
            SpecError: no node matches, or several do.
            ConflictError: the node is the head, or Ray refuses to drain it.
            ServiceError: the cluster is unreachable.
        """
        node = pick(self.all(), name)
        environment = os.environ | ray_environment(self._settings)
        try:
            done = subprocess.run(
                drain_command(self._address(), node.id, by),
                env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DRAIN_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ServiceError(f"Ray did not drain {node.address} within {DRAIN_SECONDS:g} s") from None
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise ConflictError(f"Ray refused to drain {node.address}: {lines[-1][:300]}", hint="see `monge nodes`")
        return node.model_copy(update={"draining": True})

    def _address(self) -> str:
        # `monge up` may write it after this process started, if it chose another port.
        return Settings(home=self._settings.home).address("ray_address")

    def _ask(self, path: str) -> Any:
        try:
            answer = self._client.get(path)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise ServiceError(
                f"the cluster is unreachable: {error or type(error).__name__}", hint="see `monge status`"
            ) from None
        return answer.json()["data"]


def pick(nodes: list[NodeUse], name: str) -> NodeUse:
    """Return the node with this address or with this prefix of its id.

    Raises:
        SpecError: no node matches, or several do.
        ConflictError: the node is the head.
    """
    found = [node for node in nodes if node.address == name or (name and node.id.startswith(name))]
    if len(found) != 1:
        what = "no node" if not found else f"{len(found)} nodes"
        raise SpecError(f"node: {name[:100]!r} matches {what}", hint="see `monge nodes`")
    if found[0].head:
        raise ConflictError(
            f"{found[0].address} is the head of the cluster and cannot be drained",
            hint="use `monge drain` without a node to stop all jobs",
        )
    return found[0]


def drain_command(address: str, node: str, by: str) -> list[str]:
    """Return the command that asks the head of a cluster to drain a node."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node),
        # The reason for which Ray drains a node that has work on it.
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"drained by {by}"),
        *("--deadline-remaining-seconds", str(DEADLINE)),
    ]


def _node(row: Mapping[str, Any], used: Mapping[str, Any] | None) -> NodeUse:
    total = row.get("resourcesTotal") or {}
    cpus, gpus = (None if used is None else float(used.get(kind, [0])[0]) for kind in ("CPU", "GPU"))
    return NodeUse(
        id=row["nodeId"],
        address=row["nodeManagerAddress"],
        cpus=total.get("CPU", 0),
        gpus=total.get("GPU", 0),
        used_cpus=cpus,
        used_gpus=gpus,
        head=bool(row.get("isHeadNode")),
        draining=(row.get("stateSnapshot") or {}).get("state") == "DRAINING",
    )
