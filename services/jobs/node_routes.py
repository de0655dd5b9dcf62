"""The nodes of the cluster over HTTP: listed, joined, taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response

from services.jobs.access import AdminToken, ReadToken
from services.jobs.documents import Joining, NodeList, NodeUse

if TYPE_CHECKING:
    from services.jobs.api import ApiContext


def add_node_routes(app: FastAPI, service: ApiContext) -> None:
    """Give the app the routes of nodes."""

    @app.get("/v1/nodes", summary="Nodes, and how much of each is used")
    def nodes(token: ReadToken) -> NodeList:
        """The cluster is asked for it; `used_cpus` is some seconds old."""
        return NodeList(nodes=service.nodes.all())

    @app.put("/v1/nodes/{node}/drain", summary="Take a node out of the cluster")
    def drain_node(node: str, request: Request, token: AdminToken) -> NodeUse:
        """By its address, or the beginning of its id. Workers there save a checkpoint and leave; then its raylet ends.

        There is no way back: the machine has to join again.
        """
        drained = service.nodes.drain(node, token.name)
        service.changed(request, "drain node", node=drained.id, address=drained.address)
        return drained

    @app.get("/v1/cluster/join", summary="What a machine needs to join the cluster")
    def joining(request: Request, response: Response, token: AdminToken) -> Joining:
        """The answer holds the cluster's own token, with which code runs on it: it is for administrators alone."""
        found = service.joining()
        service.changed(request, "ask how to join")
        response.headers["Cache-Control"] = "no-store"
        return found
