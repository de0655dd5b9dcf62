"""Servers beyond loopback: accepted tokens, and caching of the job service's decisions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pipelines.errors import BusyError, ServiceError, UnauthenticatedError
from pipelines.transport.solve import solve
from services import gate as gate_module
from services.error_documents import write_error
from services.gate import CACHED, KEPT, PAUSE, RemoteTokens, tokens_for
from services.jobs.api import build_app as build_jobs_app
from services.jobs.store import JobStore
from services.serving import server as endpoint_server
from services.serving.app import create_app
from services.serving.client import EndpointClient
from services.settings import Settings
from services.tokens import FRESH, Role
from services.transport import server as transport_server
from services.transport.app import build_app
from services.transport.backend import LocalBackend
from services.transport.client import HttpPlanner
from services.transport.engine import Engine
from tests.services.jobs.standin import JobService
from tests.services.transport.support import labelled, run, served

PROBLEM = {"x": [[0.0], [1.0]], "y": [[1.1], [0.2]]}


class Judge(httpx.AsyncBaseTransport):
    """A job service that accepts the given secrets, and a clock."""

    def __init__(self, *secrets: str) -> None:
        self.secrets, self.asked, self.now = set(secrets), 0, 1000.0
        self.fault: Exception | httpx.Response | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.tokens = RemoteTokens("http://jobs", self, clock=lambda: self.now)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        await self.open.wait()
        if isinstance(self.fault, Exception):
            raise self.fault
        if self.fault is not None:
            return self.fault
        secret = request.headers["authorization"].removeprefix("Bearer ")
        assert request.url == "http://jobs/v1/tokens/self"
        if secret not in self.secrets:
            return httpx.Response(401, json=write_error(UnauthenticatedError("worthless")))
        document = {"name": secret, "role": "call", "created": "2026-01-01T00:00:00Z", "revoked": None}
        return httpx.Response(200, json=document | {"requests_per_second": 1000, "max_jobs": 1})


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(
    ("role", "status"),
    [(Role.CALL, 200), (Role.ADMIN, 200), (Role.READ, 403), (Role.SUBMIT, 403), (None, 401), ("monge_wrong", 401)],
)
def test_the_job_service_says_who_may_call(tmp_path: Path, role: Role | str | None, status: int) -> None:
    jobs = JobService(tmp_path, JobStore(f"sqlite:///{tmp_path / 'jobs.db'}"))
    secret = jobs.token("somebody", role).secret if isinstance(role, Role) else role
    judge = httpx.ASGITransport(build_jobs_app(jobs.service(), loopback=False))

    async def main() -> None:
        tokens = RemoteTokens("http://jobs", judge)
        app = build_app(LocalBackend(Engine()), loopback=False, tokens=tokens)
        headers = bearer(secret) if secret else {}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://plans", headers=headers) as client:
            answer = await client.post("/v1/plans", json=PROBLEM)
            assert answer.status_code == status, answer.text
            if status != 200:
                assert answer.json()["request_id"] == answer.headers["x-request-id"]
            assert ("www-authenticate" in answer.headers) == (status == 401)

    try:
        run(main)
    finally:
        jobs.close()


def test_the_endpoint_asks_too_and_probes_need_no_token(tmp_path: Path) -> None:
    async def main() -> None:
        settings = Settings(home=tmp_path, mlflow_uri="http://127.0.0.1:9")
        apps: list[tuple[Any, str]] = [
            (create_app(settings, loopback=False, tokens=Judge("good").tokens), "/v1/models"),
            (build_app(LocalBackend(Engine()), loopback=False, tokens=Judge("good").tokens), "/v1/limits"),
        ]
        for app, path in apps:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://monge") as client:
                assert (await client.get(path)).status_code == 401
                assert (await client.get(path, headers=bearer("bad"))).status_code == 401
                assert (await client.get(path, headers={"Authorization": "Basic Z29vZA=="})).status_code == 401
                assert (await client.get(path, headers={"Authorization": b"Bearer \xe9"})).status_code == 401
                assert (await client.get(path, headers=bearer("good"))).status_code == 200
                for known in ("/health", "/metrics", "/docs", "/openapi.json"):
                    assert (await client.get(known)).status_code == 200
                documented = (await client.get("/openapi.json")).json()["paths"]
                for other in documented.keys() - {"/health", "/ready", "/metrics"}:
                    assert (await client.request("POST", other)).status_code == 401

    run(main)


def test_a_strangers_body_is_not_read() -> None:
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1000)

    async def main() -> None:
        app = build_app(LocalBackend(Engine()), loopback=False, tokens=Judge().tokens)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://plans") as client:
            assert (await client.post("/v1/plans", content=body())).status_code == 401
        assert taken == 0

    run(main)


def test_a_judgement_counts_for_half_a_minute() -> None:
    async def main() -> None:
        judge = Judge("good")
        for _ in range(3):
            assert (await judge.tokens.authenticate("good")) is not None
        judge.now += FRESH - 1
        assert (await judge.tokens.authenticate("good")) is not None
        assert judge.asked == 1
        judge.secrets.clear()
        judge.now += 1
        assert (await judge.tokens.authenticate("good")) is None
        assert judge.asked == 2
        judge.fault = httpx.ConnectError("refused")
        with pytest.raises(ServiceError):
            await judge.tokens.authenticate("good")

    run(main)


def test_requests_that_come_together_ask_once() -> None:
    async def main() -> None:
        judge = Judge("good")
        judge.open.clear()
        calls = [asyncio.create_task(judge.tokens.authenticate("good")) for _ in range(20)]
        while not judge.asked:
            await asyncio.sleep(0)
        calls[0].cancel()  # its client hung up
        judge.open.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert all(token is not None and not isinstance(token, BaseException) for token in found[1:])
        assert judge.asked == 1

    run(main)


@pytest.mark.parametrize(
    "fault",
    [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.Response(502), httpx.Response(200, text="<html>")],
)
def test_while_the_job_service_is_away_known_tokens_go_on(fault: Exception | httpx.Response) -> None:
    async def main() -> None:
        judge = Judge("good", "new")
        await judge.tokens.authenticate("good")
        judge.fault = fault
        judge.now += FRESH
        for _ in range(5):
            assert (await judge.tokens.authenticate("good")) is not None
        assert judge.asked == 2  # it is not asked for each request while it is away
        with pytest.raises(ServiceError, match="the job service") as unknown:
            await judge.tokens.authenticate("new")
        assert type(unknown.value) is ServiceError
        judge.now += KEPT - FRESH - 1
        assert (await judge.tokens.authenticate("good")) is not None
        judge.now += 1
        with pytest.raises(ServiceError):
            await judge.tokens.authenticate("good")
        judge.fault = None
        judge.now += PAUSE
        assert (await judge.tokens.authenticate("good")) is not None

    run(main)


def test_a_busy_job_service_is_passed_on_for_unknown_tokens() -> None:
    async def main() -> None:
        judge = Judge("good")
        judge.fault = httpx.Response(429, json=write_error(BusyError("busy", retry_after=3.0)))
        with pytest.raises(BusyError) as busy:
            await judge.tokens.authenticate("good")
        assert busy.value.retry_after == 3

    run(main)


def test_so_many_tokens_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CACHED == 1024
    monkeypatch.setattr(gate_module, "CACHED", 2)

    async def main() -> None:
        judge = Judge("a", "b", "c")
        for secret in "abac":  # b was used longest ago
            await judge.tokens.authenticate(secret)
        assert judge.asked == 3
        await judge.tokens.authenticate("a")
        assert judge.asked == 3
        await judge.tokens.authenticate("b")
        assert judge.asked == 4

    run(main)


def test_a_server_beyond_loopback_needs_a_job_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path, mlflow_uri="http://127.0.0.1:9")
    for host in ("127.0.0.1", "localhost", "::1"):
        assert tokens_for(host, settings) is None
    assert tokens_for("0.0.0.0", settings.model_copy(update={"jobs_url": "http://jobs:8200"})) is not None
    monkeypatch.setattr(transport_server, "load_settings", lambda: settings)
    for serve in (lambda: transport_server.serve("0.0.0.0", 0), lambda: endpoint_server.serve("0.0.0.0", 0, settings)):
        with pytest.raises(ServiceError, match=r"host: 0\.0\.0\.0 is reachable") as refused:
            serve()
        assert refused.value.hint == "set MONGE_JOBS_URL, or listen on 127.0.0.1 behind a proxy"


@pytest.fixture
def url() -> Iterator[str]:
    """Run a transport service that requires the token `good`; yield its URL."""
    with served(build_app(LocalBackend(Engine()), loopback=False, tokens=Judge("good").tokens)) as address:
        yield address


def test_the_planner_sends_its_secret(url: str) -> None:
    problem = labelled(1, n=9)
    plan = HttpPlanner(url, secret="good").plan(problem)
    np.testing.assert_array_equal(plan.assignment, solve(problem).assignment)
    with pytest.raises(UnauthenticatedError, match="no token"):
        HttpPlanner(url).plan(problem)


def test_the_endpoints_client_sends_its_secret() -> None:
    sent: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("authorization"))
        return httpx.Response(200, json={"models": []})

    for secret in ("good", None):
        with EndpointClient("http://models", transport=httpx.MockTransport(answer), secret=secret) as client:
            client.models()
    assert sent == ["Bearer good", None]
