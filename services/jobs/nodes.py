"""The nodes of the cluster as Ray's dashboard shows them now, and taking one out. Ray is not imported for it."""

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
"""Seconds for an answer of the dashboard."""

DRAIN_SECONDS = 60.0
"""Seconds for Ray's command, which imports Ray first."""

DEADLINE = 600
"""Seconds after which the node's end counts as expected whatever still runs there."""


class Nodes:
    """The nodes of one cluster.

    Args:
        settings: where its head and its dashboard are.
        transport: of httpx, for tests.
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
        """The nodes that are alive, the head first, then by address.

        Raises:
            ServiceError: the cluster is away.
        """
        try:
            rows = [row["raylet"] for row in self._ask("/nodes?view=summary")["summary"] if "nodeId" in row["raylet"]]
            report = self._ask("/api/cluster_status")["clusterStatus"].get("loadMetricsReport") or {}
            # Another autoscaler than that of a fixed cluster leaves this out.
            used = report.get("usageByNode") or {}
            found = [_node(row, used.get(row["nodeId"])) for row in rows if row["state"] == "ALIVE"]
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ServiceError(f"the dashboard's list of nodes is not understood: {error!r}") from error
        return sorted(found, key=lambda node: (not node.head, node.address))

    def drain(self, name: str, by: str) -> NodeUse:
        """Take a node out: nothing new is placed there, and what runs there is told to leave.

        Args:
            name: its address, or the beginning of its id.
            by: who asks, for Ray's log.

        Raises:
            SpecError: there is no such node, or several.
            ConflictError: it is the head, or Ray refuses.
            ServiceError: the cluster is away.
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
            lines = (done.stderr or done.stdout).strip().splitlines() or ["it does not say why"]
            raise ConflictError(f"Ray does not drain {node.address}: {lines[-1][:300]}", hint="see `monge nodes`")
        return node.model_copy(update={"draining": True})

    def _address(self) -> str:
        # Written by `monge up` after this process started, where another port was taken.
        return Settings(home=self._settings.home).address("ray_address")

    def _ask(self, path: str) -> Any:
        try:
            answer = self._client.get(path)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise ServiceError(
                f"the cluster is away: {error or type(error).__name__}", hint="see `monge status`"
            ) from None
        return answer.json()["data"]


def pick(nodes: list[NodeUse], name: str) -> NodeUse:
    """The node of an address, or of the beginning of an id.

    Raises:
        SpecError: there is none, or there are several.
        ConflictError: it is the head.
    """
    found = [node for node in nodes if node.address == name or (name and node.id.startswith(name))]
    if len(found) != 1:
        what = "no node" if not found else f"{len(found)} nodes"
        raise SpecError(f"node: {name[:100]!r} names {what}", hint="see `monge nodes`")
    if found[0].head:
        raise ConflictError(
            f"{found[0].address} is the head of the cluster, which cannot go on without it",
            hint="`monge drain` without a node stops all jobs first",
        )
    return found[0]


def drain_command(address: str, node: str, by: str) -> list[str]:
    """What asks the head of a cluster to drain a node."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node),
        # The reason that Ray takes of a node with work on it.
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
