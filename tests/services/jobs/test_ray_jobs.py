"""The client of Ray's REST API: valid responses, and all kinds of failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from services.jobs.policy import Cluster
from services.jobs.ray_jobs import EngineError, RayJobs, RefusedError
from services.jobs.states import AttemptStatus

NODES = {
    "result": True,
    "data": {
        "result": {
            "result": [
                {"node_id": "a", "node_ip": "127.0.0.1", "state": "ALIVE", "resources_total": {"CPU": 2.0, "GPU": 1.0}},
                {"node_id": "b", "node_ip": "127.0.0.2", "state": "ALIVE", "resources_total": {"CPU": 4.0}},
                {"node_id": "c", "node_ip": "127.0.0.3", "state": "DEAD", "resources_total": {"CPU": 64.0}},
                {"node_id": "d", "node_ip": "127.0.0.4", "state": "ALIVE", "resources_total": None},
            ]
        }
    },
}


class Dashboard:
    """Responds as configured by the test, and records the requests."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.log: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        key = f"{request.method} {request.path}"
        self.asked.append((key, await request.text(), request.headers.get("Authorization")))
        if key.endswith("/tail"):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            for text in self.log:
                await socket.send_str(text)
            await socket.close()
            return socket
        status, document = self.answers.get(key, (404, "no such job"))
        text = document if isinstance(document, str) else json.dumps(document)
        return web.Response(status=status, text=text)


def asking(dashboard: Dashboard, ask: Callable[[RayJobs], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", dashboard.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        engine = RayJobs(f"http://127.0.0.1:{runner.addresses[0][1]}/", "the-token")
        try:
            return await ask(engine)
        finally:
            await engine.close()
            await runner.cleanup()

    return asyncio.run(run())


def test_the_nodes_that_are_alive_are_counted() -> None:
    dashboard = Dashboard()
    dashboard.answers["GET /api/v0/nodes"] = (200, NODES)
    cluster, nodes = asking(dashboard, lambda engine: engine.look())
    assert cluster == Cluster(cpus=6.0, gpus=1.0)
    assert [node.id for node in nodes] == ["a", "b", "d"]
    assert {authorization for _, _, authorization in dashboard.asked} == {"Bearer the-token"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, "broken"), "responded with status 500"),
        ((401, "who are you"), "responded with status 401"),
        ((200, "<html>"), "did not send JSON"),
        ((200, []), "sent []"),
        ((200, {}), "is not a Ray dashboard (KeyError)"),
        ((200, {"data": {"result": {"result": [3]}}}), "is not a Ray dashboard (TypeError)"),
    ],
)
def test_what_is_no_cluster_is_a_cluster_that_is_away(answer: tuple[int, Any], said: str) -> None:
    dashboard = Dashboard()
    dashboard.answers["GET /api/v0/nodes"] = answer
    cluster, nodes = asking(dashboard, lambda engine: engine.look())
    assert said in str(cluster.away)
    assert nodes == []


def test_nobody_there_is_a_cluster_that_is_away() -> None:
    async def look() -> Cluster:
        engine = RayJobs("http://127.0.0.1:9")
        try:
            return (await engine.look())[0]
        finally:
            await engine.close()

    assert "127.0.0.1:9" in str(asyncio.run(look()).away)


def test_an_attempt_has_a_status_or_is_unknown() -> None:
    dashboard = Dashboard()
    dashboard.answers["GET /api/jobs/x-a1"] = (200, {"status": "FAILED", "message": "exit code 1"})
    found = asking(dashboard, lambda engine: engine.status("x-a1"))
    assert (found.status, found.message) == (AttemptStatus.FAILED, "exit code 1")
    assert asking(dashboard, lambda engine: engine.status("x-a2")).status is AttemptStatus.UNKNOWN
    dashboard.answers["GET /api/jobs/x-a1"] = (200, {"status": "LOST"})
    with pytest.raises(EngineError, match="LOST"):
        asking(dashboard, lambda engine: engine.status("x-a1"))


def test_a_lost_answer_to_a_submission_is_no_error_if_the_cluster_has_it() -> None:
    dashboard = Dashboard()
    dashboard.answers["POST /api/jobs/"] = (500, "timeout")
    with pytest.raises(EngineError, match="status 500"):
        asking(dashboard, lambda engine: engine.submit("x-a1", "python", {}))
    dashboard.answers["GET /api/jobs/x-a1"] = (200, {"status": "PENDING", "message": None})
    asking(dashboard, lambda engine: engine.submit("x-a1", "python", {"name": "x"}))
    body = json.loads(dashboard.asked[-2][1])
    assert body == {"submission_id": "x-a1", "entrypoint": "python", "metadata": {"name": "x"}}
    dashboard.answers |= {"POST /api/jobs/": (400, "Traceback\nValueError: too long"), "GET /api/jobs/x-a1": (404, "")}
    with pytest.raises(RefusedError, match="ValueError: too long"):
        asking(dashboard, lambda engine: engine.submit("x-a1", "python", {}))


def test_a_log_is_tailed_to_its_end() -> None:
    dashboard = Dashboard()
    dashboard.log = ["one\ntwo\n", "three"]

    async def tail(engine: RayJobs) -> list[str]:
        return [text async for text in engine.tail("x-a1")]

    assert asking(dashboard, tail) == dashboard.log
