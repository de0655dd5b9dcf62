"""HTTP routes for the nodes of the cluster: list, join, drain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response

from services.jobs.access import AdminToken, ReadToken
from services.jobs.documents import Joining, NodeList, NodeUse

if TYPE_CHECKING:
    from services.jobs.api import ApiContext


def add_node_routes(app: FastAPI, service: ApiContext) -> None:
    """Add the routes for nodes to the app."""

    @app.get("/v1/nodes", summary="List nodes and their used resources")
    def nodes(token: ReadToken) -> NodeList:
        """List the nodes of the cluster. `used_cpus` may be some seconds old."""
        return NodeList(nodes=service.nodes.all())

    @app.put("/v1/nodes/{node}/drain", summary="Drain a node")
    def drain_node(node: str, request: Request, token: AdminToken) -> NodeUse:
        """Drain a node, given by its address or an id prefix. Its workers save a checkpoint; then the node leaves.

        A drain cannot be undone: the machine must join again.
        """
        drained = service.nodes.drain(node, token.name)
        service.changed(request, "drain node", node=drained.id, address=drained.address)
        return drained

    @app.get("/v1/cluster/join", summary="Get the parameters to join the cluster")
    def joining(request: Request, response: Response, token: AdminToken) -> Joining:
        """Return the parameters to join the cluster, including the Ray token, which allows running code on it."""
        found = service.joining()
        service.changed(request, "ask how to join")
        response.headers["Cache-Control"] = "no-store"
        return found
