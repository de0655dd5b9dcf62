"""The service as a separate process."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch

from pipelines.errors import RendezvousError, ServiceError
from pipelines.transport.planner import Share
from pipelines.transport.solve import solve
from services.transport.client import HttpPlanner
from tests.services.transport.support import labelled

pytestmark = pytest.mark.slow


@contextmanager
def process(*options: str, start: float = 90) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the service; yield its URL and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "services.transport", "--port", str(port), *options]
    server = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + start
        while not healthy(url):
            assert server.poll() is None, f"the server ended with {server.returncode}"
            assert time.monotonic() < until, "the server did not come up"
            time.sleep(0.05)
        yield url, server
    finally:
        server.terminate()
        try:
            server.wait(30)
        finally:
            server.kill()


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_refuses_who_waits_and_ends_the_process() -> None:
    with process() as (url, server):
        # One rank of two waits; it gets an error before its deadline.
        heard: list[Exception] = []

        def wait() -> None:
            try:
                share = Share("k", torch.ones(2, 2), torch.ones(2, 2))
                HttpPlanner(url, "j", 0, 2, 8, attempt="a").plan_rows(share)
            except (RendezvousError, ServiceError) as error:
                heard.append(error)

        rank = threading.Thread(target=wait)
        rank.start()
        until = time.monotonic() + 7
        while "monge_transport_meetings 1.0" not in httpx.get(f"{url}/metrics", trust_env=False).text:
            assert time.monotonic() < until, "the rank did not come"
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        rank.join(20)
        assert len(heard) == 1


def test_a_taken_port_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "services.transport", "--port", port]
        ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr.decode()


def test_the_gateway_owns_the_actors_that_it_created(ray_cluster: None) -> None:
    import ray

    from services.transport.actor import find_replicas

    address = ray.get_runtime_context().gcs_address
    with process("--ray", address, "--replicas", "3", "--resource", "0.5") as (url, server):
        assert find_replicas() == ["transport-0", "transport-1", "transport-2"]
        problem = labelled(1, n=30)
        np.testing.assert_array_equal(HttpPlanner(url).plan(problem).assignment, solve(problem).assignment)
        assert 'replica="transport-2"' in httpx.get(f"{url}/metrics", trust_env=False).text
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    with pytest.raises(ServiceError, match="no transport service is running"):
        find_replicas()
