"""The rendezvous address of the workers of a job."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from pipelines.errors import RankError, StorageError, TrainingError
from services.training import backend
from services.training.backend import interface_of, use_node_interface
from services.training.trainer import _failure

ADDRESSES = {
    "lo": [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)],
    "eth0": [("192.0.2.7", socket.AF_INET), ("fe80::7%eth0", socket.AF_INET6)],
}


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        name: [SimpleNamespace(address=address, family=family) for address, family in entries]
        for name, entries in ADDRESSES.items()
    }
    monkeypatch.setattr(backend.psutil, "net_if_addrs", lambda: found)


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.7") == "eth0"
    assert interface_of("fe80::7") == "eth0"
    assert interface_of("192.0.2.8") is None


@pytest.mark.parametrize(("set_before", "expected"), [(None, "eth0"), ("ib0", "ib0")])
def test_gloo_and_nccl_take_the_interface_that_ray_knows(
    monkeypatch: pytest.MonkeyPatch, set_before: str | None, expected: str
) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, set_before or "")
        if set_before is None:
            monkeypatch.delenv(variable)
    monkeypatch.setattr(backend.ray.util, "get_node_ip_address", lambda: "192.0.2.7")
    use_node_interface()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (expected, expected)


def test_the_rank_that_failed_is_heard_before_those_that_heard_of_it() -> None:
    failures = {0: RankError("rank 1 failed"), 1: StorageError("no answer", hint="look at the bucket")}
    told = _failure("job-1", WorkerGroupError("two workers", failures))
    assert isinstance(told, StorageError)
    assert str(told) == "no answer\n  hint: look at the bucket"
    told = _failure("job-1", WorkerGroupError("one worker", {0: OSError("disk full")}))
    assert isinstance(told, TrainingError)
    assert str(told) == "the workers of job-1 failed: rank 0: OSError: disk full\n  hint: read `monge logs job-1`"
