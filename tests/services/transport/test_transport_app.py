"""The service over HTTP, in this process."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from pipelines.errors import ProblemError, RendezvousError, ServiceError, TooLargeError
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from services.error_documents import read_error, write_error
from services.transport import wire
from services.transport.app import build_app
from services.transport.backend import LocalBackend
from services.transport.engine import Engine
from services.transport.limits import Limits
from services.transport.npz import read_npz, write_npz
from tests.services.transport.support import ASSIGNMENT, GatedSolver, labelled, run, until

X = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
Y = np.array([[0.1, 2.0], [0.0, 0.1], [1.2, 0.0]])


@contextlib.asynccontextmanager
async def service(engine: Engine | None = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(LocalBackend(engine or Engine()), **options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
        yield client


def npz(**arrays: Any) -> dict[str, Any]:
    return {"content": write_npz(arrays), "headers": {"Content-Type": wire.NPZ}}


def test_json_in_json_out() -> None:
    async def main() -> None:
        async with service() as client:
            answer = await client.post("/v1/plans", json={"x": X.tolist(), "y": Y.tolist()})
            assert answer.status_code == 200
            plan = answer.json()
            assert plan["assignment"] == [1, 2, 0]
            assert plan["shape"] == [3, 3]
            assert plan["certificate"]["converged"] is True
            assert plan["certificate"]["relative_gap"] < 1e-5
            assert "f" not in plan

    run(main)


def test_npz_in_npz_out() -> None:
    async def main() -> None:
        async with service() as client:
            answer = await client.post("/v1/plans?potentials=true", **npz(x=X, y=Y, cost="euclidean"))
            assert answer.headers["content-type"] == wire.NPZ
            plan = read_npz(answer.content, 10**6)
            np.testing.assert_array_equal(plan["assignment"], [1, 2, 0])
            certificate = json.loads(str(plan["certificate"]))
            assert plan["f"].mean() + plan["g"].mean() == pytest.approx(certificate["dual"])

    run(main)


def test_weights_and_a_matrix_give_a_sparse_plan() -> None:
    async def main() -> None:
        async with service() as client:
            problem = {"matrix": [[0.0, 1.0], [1.0, 0.0], [3.0, 3.0]], "a": [1, 1, 2], "b": [2, 2]}
            answer = await client.post("/v1/plans?dense=true&potentials=true", json=problem)
            plan = answer.json()
            dense = np.zeros((3, 2))
            dense[plan["rows"], plan["columns"]] = plan["mass"]
            np.testing.assert_allclose(dense, plan["dense"])
            np.testing.assert_allclose(dense.sum(1), [0.25, 0.25, 0.5])
            assert len(plan["f"]) == 3

    run(main)


def test_a_plan_comes_back_as_it_was() -> None:
    plans = [
        solve(labelled(1, n=5)),
        solve(TransportProblem.between(X, Y, a=np.array([0.5, 0.25, 0.25]))),
    ]
    for plan in plans:
        read = wire.read_plan(wire.write_plan(plan, wire.NPZ, potentials=True))
        assert read.shape == plan.shape
        assert read.certificate == plan.certificate
        np.testing.assert_array_equal(read.dense(), plan.dense())
        np.testing.assert_array_equal(read.f, plan.f)


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"x": [[0.0]]}, "y", "missing"),
        ({"y": [[0.0]]}, "x", "missing"),
        ({}, "matrix", "received the fields none"),
        ({"x": [[0.0]], "y": [[0.0]], "matrix": [[0.0]]}, "matrix", "x, y, matrix"),
        ({"x": [[0.0], [1.0, 2.0]], "y": [[0.0]]}, "x", "different lengths"),
        ({"x": [[0.0]], "y": [["a"]]}, "y", "valid number"),
        ({"x": [[0.0]], "y": [[0.0]], "cost": "manhattan"}, "cost", "squared-euclidean"),
        ({"x": [[0.0]], "y": [[0.0]], "epsilon": -1}, "epsilon", "greater than or equal"),
        ({"x": [[0.0]], "y": [[0.0]], "solver": "magic"}, "solver", "auto"),
        ({"x": [[0.0]], "y": [[0.0]], "a": [1.0, 2.0]}, "a", "one weight for each point"),
        ({"x": [[0.0]], "y": [[0.0]], "extra": 1}, "extra", "not permitted"),
    ],
)
def test_a_fault_is_422_with_its_field(body: dict[str, Any], field: str, words: str) -> None:
    async def main() -> None:
        async with service() as client:
            answer = await client.post("/v1/plans", json=body)
            assert answer.status_code == 422
            error = answer.json()
            assert error["error"] == "ProblemError"
            assert words in error["message"]
            assert error.get("field", field) == field

    run(main)


def test_faults_in_npz_are_422_with_their_field() -> None:
    async def main() -> None:
        async with service() as client:
            for arrays, field in (
                ({"x": X, "y": np.full((3, 2), np.nan)}, "y"),
                ({"x": X, "y": Y, "cost": "manhattan"}, "cost"),
                ({"x": X, "y": Y, "epsilon": np.nan}, "epsilon"),
                ({"x": X, "y": np.array([["a", "b"]])}, "y"),
                ({"x": X, "y": Y, "solver": np.array(["auto", "auto"])}, "solver"),
            ):
                answer = await client.post("/v1/plans", **npz(**arrays))
                assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text

    run(main)


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"{", b"[" * 100_000, b'{"x": [[1e999]], "y": [[0]]}', b"\xff\xfe", b"null"]
)
@pytest.mark.parametrize("kind", [wire.JSON, wire.NPZ])
@pytest.mark.parametrize("path", ["/v1/plans", "/v1/shares"])
def test_malformed_bodies_are_422(content: bytes, kind: str, path: str) -> None:
    async def main() -> None:
        async with service() as client:
            answer = await client.post(path, content=content, headers={"Content-Type": kind})
            assert answer.status_code == 422
            assert answer.json()["error"] == "ProblemError"

    run(main)


def test_other_formats_are_415() -> None:
    async def main() -> None:
        async with service() as client:
            answer = await client.post("/v1/plans", content=b"x", headers={"Content-Type": "text/csv"})
            assert answer.status_code == 415
            assert answer.json()["field"] == "content-type"

    run(main)


def test_a_body_over_the_limit_is_413_before_it_is_read() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1000)

    async def main() -> None:
        async with service(max_request=5000) as client:
            headers = {"Content-Type": wire.NPZ, "Content-Length": "5001"}
            answer = await client.post("/v1/plans", content=endless(), headers=headers)
            assert answer.status_code == 413
            assert answer.json()["error"] == "TooLargeError"
            assert taken == 0
            # Without a declared length it shows on the way.
            answer = await client.post("/v1/plans", content=endless(), headers={"Content-Type": wire.NPZ})
            assert answer.status_code == 413
            assert taken <= 7

    run(main)


def test_a_dense_plan_is_limited_and_so_is_json() -> None:
    async def main() -> None:
        async with service(Engine(Limits(json_bytes=1000))) as client:
            x = np.zeros((1025, 1))
            answer = await client.post("/v1/plans?dense=true", **npz(x=x, y=x))
            assert answer.status_code == 413
            answer = await client.post("/v1/plans", json={"x": x.tolist(), "y": x.tolist()})
            assert answer.status_code == 413
            assert "npz" in answer.json()["hint"]

    run(main)


def test_problems_over_the_limits_are_413() -> None:
    async def main() -> None:
        async with service(Engine(Limits(points=2))) as client:
            answer = await client.post("/v1/plans", **npz(x=X, y=Y))
            assert answer.status_code == 413
            assert isinstance(read_error(answer.content, 413, "it"), TooLargeError)

    run(main)


def test_a_full_queue_is_429_with_the_time_to_come_back(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(Limits(queue=1), workers=1, solver=gated)
        async with service(engine) as client:
            calls = [asyncio.ensure_future(client.post("/v1/plans", **npz(x=X, y=Y)))]
            await gated.begun()
            calls.append(asyncio.ensure_future(client.post("/v1/plans", **npz(x=Y, y=X))))
            await until(lambda: engine.waiting == 1)
            answer = await client.post("/v1/plans", **npz(x=X, y=X))
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["retry_after"] == pytest.approx(0.1)
            gated.gate.set()
            assert [(await call).status_code for call in calls] == [200, 200]

    run(main)


def test_a_client_that_hangs_up_frees_its_place(gated: GatedSolver) -> None:
    async def main() -> None:
        engine = Engine(workers=1, solver=gated)
        blocker = asyncio.ensure_future(engine.submit(labelled(1)))
        await gated.begun()
        app = build_app(LocalBackend(engine))
        hang_up, sent = asyncio.Event(), []
        messages = [{"type": "http.request", "body": write_npz({"x": X, "y": Y}), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await hang_up.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/plans",
            "query_string": b"",
            "headers": [(b"content-type", wire.NPZ.encode())],
        }
        call = asyncio.ensure_future(app(scope, receive, send))
        await until(lambda: engine.waiting == 1)
        hang_up.set()
        await call
        assert (engine.waiting, engine.queued_bytes) == (0, 0)
        assert sent[0]["status"] == 499
        gated.gate.set()
        await blocker

    run(main)


def test_foreign_pages_are_refused_on_loopback_alone() -> None:
    async def main() -> None:
        for headers in ({"Host": "evil.example:8100"}, {"Origin": "https://evil.example"}):
            async with service() as client:
                answer = await client.get("/v1/limits", headers=headers)
                assert (answer.status_code, answer.json()["error"]) == (403, "ForbiddenError")
            async with service(loopback=False) as client:
                assert (await client.get("/v1/limits", headers=headers)).status_code == 200

    run(main)


def share(rank: int, **changes: Any) -> dict[str, Any]:
    said = {"job": "j", "key": "k", "rank": rank, "world": 2, "x": X[rank::2], "y": Y[rank::2]}
    return npz(**(said | changes))


def test_ranks_meet_over_http() -> None:
    async def main() -> None:
        async with service() as client:
            answers = await asyncio.gather(*(client.post("/v1/shares", **share(rank)) for rank in (1, 0)))
            second, first = (wire.read_rows(answer.content) for answer in answers)
            whole = solve(TransportProblem.between(np.r_[X[::2], X[1::2]], np.r_[Y[::2], Y[1::2]]))
            np.testing.assert_array_equal(np.r_[first.columns, second.columns], whole.assignment)
            assert first.certificate.primal == pytest.approx(whole.certificate.primal)

    run(main)


def test_a_rank_that_does_not_come_is_409_with_its_name() -> None:
    async def main() -> None:
        async with service() as client:
            answer = await client.post("/v1/shares", **share(0, deadline=0.02))
            assert answer.status_code == 409
            error = read_error(answer.content, 409, "it")
            assert isinstance(error, RendezvousError)
            assert "rank 1 did not send a share" in str(error)
            assert error.hint

    run(main)


def test_health_limits_metrics_and_the_document() -> None:
    async def main() -> None:
        async with service(Engine(Limits(points=77)), max_request=5000) as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            limits = (await client.get("/v1/limits")).json()
            assert (limits["points"], limits["request_bytes"]) == (77, 5000)
            await client.post("/v1/plans", **npz(x=X, y=Y))
            metrics = (await client.get("/metrics")).text
            assert f'monge_transport_solves_total{{solver="{ASSIGNMENT}"}} 1.0' in metrics
            document = (await client.get("/openapi.json")).json()
            content = document["paths"]["/v1/plans"]["post"]["requestBody"]["content"]
            example = content["application/json"]["schema"]["examples"][0]
            assert (await client.post("/v1/plans", json=example)).status_code == 200

    run(main)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"error": "system", "message": ""}', b'{"error": "annotations", "message": ""}']
)
def test_an_answer_that_is_no_error_of_ours_is_a_service_error(body: bytes) -> None:
    assert type(read_error(body, 502, "it")) is ServiceError


def test_errors_cross_as_the_same_class() -> None:
    error = ProblemError("x: no", hint="yes")
    read = read_error(json.dumps(write_error(error)).encode(), 422, "it")
    assert (type(read), str(read)) == (ProblemError, str(error))
