"""A solver that a test can block, a server in a thread, and a runner for coroutines with a timeout."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from pipelines.transport.plan import TransportPlan
from pipelines.transport.problem import TransportProblem
from pipelines.transport.solve import choose, solve

ASSIGNMENT, _ = choose(TransportProblem.between(np.zeros((2, 1)), np.zeros((2, 1))))
"""The solver of uniform problems: native if it is built."""


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


class GatedSolver:
    """Solves like the real solver, but only while its gate is open; records the labels of its problems."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.seen: list[float] = []

    def __call__(self, problem: TransportProblem, solver: Any = "auto") -> TransportPlan:
        self.seen.append(label_of(problem))
        self.entered.release()
        assert self.gate.wait(10), "the test did not open the gate"
        return solve(problem, solver)

    async def begun(self, times: int = 1) -> None:
        """Wait until the solver has been called ``times`` more times."""
        for _ in range(times):
            assert await asyncio.to_thread(self.entered.acquire, timeout=10), "the solver was not called"


def labelled(label: float, n: int = 4, d: int = 3) -> TransportProblem:
    """Create a problem with a label as first coordinate."""
    generator = np.random.default_rng(int(label))
    x, y = generator.normal(size=(n, d)), generator.normal(size=(n, d))
    x[0, 0] = label
    return TransportProblem.between(x, y)


def label_of(problem: TransportProblem) -> float:
    """Return the label of a problem of :func:`labelled`."""
    assert problem.x is not None
    return float(problem.x[0, 0])


def run(main: Callable[[], Awaitable[Any]], timeout: float = 30) -> Any:
    """Run a coroutine on a new event loop, with a timeout."""

    async def bounded() -> Any:
        async with asyncio.timeout(timeout):
            return await main()

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Yield to other coroutines until a condition holds."""
    while not condition():
        await asyncio.sleep(0)
