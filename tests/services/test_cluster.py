"""Joining a Ray cluster."""

import socket
import time

import pytest

from pipelines.errors import ServiceError
from services.cluster import join_cluster
from services.settings import Settings


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_nothing_listens_it_is_said_at_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again as soon as it is closed
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{port}")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # an earlier test may have joined one
    started = time.perf_counter()
    with pytest.raises(
        ServiceError, match=f"the Ray cluster at {scheme}127.0.0.1:{port} is unreachable: .*refused"
    ) as caught:
        join_cluster(Settings())
    assert time.perf_counter() - started < 30
    assert "monge up" in str(caught.value.hint)
