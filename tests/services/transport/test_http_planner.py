"""The HTTP planner with a server on a thread of this process."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch

from pipelines.errors import (
    BusyError,
    ForbiddenError,
    ProblemError,
    RendezvousError,
    ServiceError,
    UnauthenticatedError,
)
from pipelines.transport.plan import RowBlock
from pipelines.transport.planner import Share
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import solve
from services.error_documents import status_of, write_error
from services.transport import wire
from services.transport.app import build_app
from services.transport.backend import LocalBackend
from services.transport.client import HttpPlanner
from services.transport.engine import Engine
from tests.services.transport.support import labelled, served


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(build_app(LocalBackend(Engine()))) as address:
        yield address


def test_plans_of_every_kind_cross_http(url: str) -> None:
    planner = HttpPlanner(url, "job")
    problems = [
        labelled(1, n=30),
        TransportProblem.between(torch.randn(5, 2), torch.randn(7, 2), a=np.arange(5), cost="euclidean"),
        TransportProblem.from_cost(np.random.default_rng(0).random((4, 6))),
        labelled(1, n=5).with_matrix(np.eye(5, dtype=np.float32)),
    ]
    for problem in problems:
        plan, local = planner.plan(problem), solve(problem)
        np.testing.assert_array_equal(plan.dense(), local.dense())
        np.testing.assert_array_equal(plan.f, local.f)
    planner.close()


def test_ranks_meet_over_http(url: str) -> None:
    x, y = torch.randn(30, 2), torch.randn(30, 2)

    def ask(rank: int) -> np.ndarray:
        planner = HttpPlanner(url, "ranks", rank, 3, 20, attempt="a")
        block = planner.plan_rows(Share("step 1", x[10 * rank :][:10], y[10 * rank :][:10]))
        assert block.waited > 0
        return block.columns

    with ThreadPoolExecutor(3) as pool:
        columns = np.concatenate(list(pool.map(ask, range(3))))
    np.testing.assert_array_equal(columns, solve(TransportProblem.between(x, y)).assignment)


@pytest.mark.parametrize("b", [torch.tensor([1.0, 0.0, 2.0, 4.0]), torch.arange(4)])
def test_weights_of_a_share_travel(url: str, b: torch.Tensor) -> None:
    x, y = torch.randn(5, 2), torch.randn(4, 2)
    block = HttpPlanner(url, "weighted", attempt=str(b.dtype)).plan_rows(Share("step 1", x, y, b=b))
    arrived = np.bincount(block.columns, block.mass, minlength=4)
    np.testing.assert_allclose(arrived, b / b.sum(), atol=1e-12)


def test_errors_arrive_as_they_were_raised(url: str) -> None:
    with pytest.raises(ProblemError, match="brute force takes"):
        HttpPlanner(url, solver="brute-force").plan(labelled(1, n=9))
    with pytest.raises(RendezvousError, match="rank 1 did not send a share"):
        HttpPlanner(url, "j", 0, 2, 0.2, attempt="a").plan_rows(Share("k", torch.ones(2, 2), torch.ones(2, 2)))


def test_an_absent_service_is_a_service_error_after_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ServiceError, match=r"was unreachable for 0\.3 s") as absence:
        HttpPlanner(f"http://127.0.0.1:{port}", deadline=0.3).plan(labelled(1))
    assert time.monotonic() - started < 30  # the deadline of its own choice is twice as long
    assert absence.value.hint


def test_a_busy_service_is_asked_again_until_the_deadline() -> None:
    answers = [429, 429, 200]

    def answer(request: httpx.Request) -> httpx.Response:
        if answers.pop(0) == 429:
            return httpx.Response(429, json={"error": "BusyError", "message": "busy", "retry_after": 0.01})
        return httpx.Response(200, content=wire.write_plan(solve(labelled(1)), wire.NPZ))

    client = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test")
    assert HttpPlanner("", client=client).plan(labelled(1)).certificate.converged
    answers = [429] * 1000
    with pytest.raises(BusyError, match="busy"):
        HttpPlanner("", deadline=0.1, client=client).plan(labelled(1))


@pytest.mark.parametrize("kind", [UnauthenticatedError, ForbiddenError])
def test_a_refusal_is_not_repeated(kind: type[ServiceError]) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(status_of(kind("no")), json=write_error(kind("no")))

    client = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test")
    with pytest.raises(kind, match="no"):
        HttpPlanner("", client=client).plan(labelled(1))
    assert len(asked) == 1


def test_a_rank_whose_answer_is_lost_asks_again_and_gets_its_rows(url: str) -> None:
    x, y = torch.randn(20, 2), torch.randn(20, 2)
    cut: list[int] = []

    class Cut(httpx.HTTPTransport):
        """Breaks the connection once, after the service has responded."""

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            answer = super().handle_request(request)
            if not cut:
                cut.append(answer.status_code)
                answer.close()
                raise httpx.ReadError("connection reset")
            return answer

    def ask(rank: int) -> np.ndarray:
        client = httpx.Client(base_url=url, transport=Cut()) if rank else None
        planner = HttpPlanner(url, "cut", rank, 2, 30, attempt="a", client=client)
        return planner.plan_rows(Share("step 1", x[10 * rank :][:10], y[10 * rank :][:10])).columns

    with ThreadPoolExecutor(2) as pool:
        columns = np.concatenate(list(pool.map(ask, range(2))))
    np.testing.assert_array_equal(columns, solve(TransportProblem.between(x, y)).assignment)
    assert cut == [200]


def test_a_rank_confirms_only_calls_that_have_ended() -> None:
    sent: list[tuple[str, int, int]] = []
    together = threading.Barrier(2)
    block = RowBlock(*np.zeros((2, 1), np.int64), np.ones(1), solve(labelled(1)).certificate)

    def answer(request: httpx.Request) -> httpx.Response:
        share, _ = wire.read_share(request.read(), wire.NPZ, 2**20)
        sent.append((share.key, share.number, share.received))
        if share.key in "ab":
            together.wait(30)
        return httpx.Response(200, content=wire.write_rows(block, wire.NPZ))

    client = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test")
    planner = HttpPlanner("", client=client, attempt="a")
    points = torch.ones(1, 2)
    planner.plan_rows_each([Share(key, points, points) for key in "ab"])
    planner.plan_rows(Share("c", points, points))
    assert sorted(number for _, number, _ in sent) == [0, 1, 2]
    assert [received for key, _, received in sent if key in "ab"] == [0, 0]
    assert sent[-1] == ("c", 2, 2)
