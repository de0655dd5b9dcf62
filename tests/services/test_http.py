"""The HTTP layer of all servers: round trip of errors, and timeouts of bodies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from pipelines import errors
from pipelines.errors import BusyError, MongeError, NotConvergedError, ServiceError
from services.error_documents import STATUS, read_error, status_of, write_error
from services.http import Guard, protect

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MongeError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_back_as_it_was(kind: type[MongeError]) -> None:
    error = kind("n: 3 received", hint="send 2")
    found = read_error(json.dumps(write_error(error)).encode(), status_of(error), "the service")
    assert type(found) is kind
    assert (found.args, found.hint) == (error.args, error.hint)


def test_a_busy_server_says_when_to_ask_again() -> None:
    found = read_error(json.dumps(write_error(BusyError("full", retry_after=7.5))).encode(), 429, "the service")
    assert isinstance(found, BusyError)
    assert found.retry_after == 7.5


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[]", b"{}", b'{"error": "Exception", "message": "m"}', b'{"error": "annotations", "message": ""}'],
)
def test_what_is_no_error_of_ours_is_told_as_it_came(body: bytes) -> None:
    found = read_error(body, 502, "the service")
    assert type(found) is ServiceError
    assert found.args[0] == f"the service responded with status 502: {body!r}"


def test_of_two_classes_that_fit_the_nearer_counts() -> None:
    for kind, status in STATUS.items():
        assert status_of(kind("m")) == status, kind


def client(limit: int = 100, **guard: Any) -> TestClient:
    app = FastAPI()

    @app.post("/size")
    async def size(request: Request) -> int:
        return len(await request.body())

    @app.post("/parsed")
    def parsed(body: dict[str, int]) -> dict[str, int]:
        if "n" in body:
            raise NotConvergedError("n: too many", hint="fewer")
        return body

    protect(app, max_bytes=limit, **guard)
    return TestClient(app, raise_server_exceptions=False)


def test_a_body_that_is_read_or_parsed_is_limited_alike() -> None:
    asked = client()
    assert asked.post("/size", content=b"x" * 100).json() == 100
    for path in ("/size", "/parsed"):
        answer = asked.post(path, content=b" " * 101)
        assert (answer.status_code, answer.json()["error"]) == (413, "TooLargeError")


def test_the_field_at_fault_is_named() -> None:
    answer = client().post("/parsed", json={"n": 1})
    assert (answer.status_code, answer.json()["field"]) == (422, "n")
    answer = client().post("/parsed", json={"m": "x"})
    assert (answer.status_code, answer.json()["field"]) == (422, "m")
    assert client().get("/nowhere").json()["error"] == "ServiceError"


def test_a_request_has_its_own_id_or_gets_one() -> None:
    asked = client()
    assert asked.post("/size", headers={"X-Request-ID": "mine.1"}).headers["x-request-id"] == "mine.1"
    for strange in (b"a b", b"x" * 65, b"\xe9"):
        given = asked.post("/size", headers={b"X-Request-ID": strange}).headers["x-request-id"]
        assert len(given) == 16


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "headers": []}
    with pytest.raises(Exception, match=r"did not arrive within 0\.01 s") as caught:
        asyncio.run(Guard(app, 100, None, body_seconds=0.01)(scope, never, send))
    assert getattr(caught.value, "status_code", None) == 408


def test_a_client_that_hangs_up_later_is_waited_for() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["type"])
        seen.append((await receive())["type"])

    async def receive() -> dict[str, Any]:
        if seen:
            await asyncio.sleep(0.05)  # longer than a body may take
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    asyncio.run(Guard(app, 100, None, body_seconds=0.01)({"type": "http", "headers": []}, receive, send))
    assert seen == ["http.request", "http.disconnect"]
