"""A platform on two machines with a shared home folder: two network namespaces connected by a link."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.platform.processes import wait_until
from tests.services.platform.machines import ADDRESSES, Machines, two_machines

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]

JOB = ["submit", "configs/perceptron.yaml", "--set", "data.source=digits", "--set", "workers.count=2"]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with two_machines(tmp_path / "home") as machines:
        yield machines


def test_a_second_machine_joins_trains_comes_again_and_is_drained(machines: Machines) -> None:
    told = machines.monge(0, "up", "--host", ADDRESSES[0], "--cpus", "1")
    assert "requires no token: keep its port behind a firewall" in told
    url = f"http://{ADDRESSES[0]}:8200"
    assert f"MONGE_TOKEN=$(cat {machines.home / 'token'}) monge node join {url}" in told
    assert machines.monge(0, "status").count("answers") == 5

    refused = machines.monge(1, "node", "join", url, "--token", "guessed", fails=True)
    assert "an invalid token" in refused
    assert not machines.alive(1)

    token = (machines.home / "token").read_text().strip()
    node = machines.start(1, "node", "join", url, "--token", token, "--cpus", "1")
    assert wait_until(lambda: len(machines.nodes()) == 1, timeout=90)
    (first,) = machines.nodes()

    output = machines.monge(0, *JOB, "--set", "name=both", "--set", "train.images=6400", "--follow")
    assert "registering both@live" in output
    assert "both" in machines.monge(0, "models")

    (raylet,) = [process for process in machines.alive(1) if process.name() == "raylet"]
    raylet.kill()
    assert wait_until(lambda: any(name != first for name in machines.nodes()), timeout=90)
    # Ray may count the dead one for some seconds.
    assert wait_until(lambda: first not in machines.nodes(), timeout=90)
    (second,) = machines.nodes()

    submitted = machines.monge(0, *JOB, "--set", "name=leaves", "--set", "train.images=100000000")
    job = next(word for word in submitted.split() if word.startswith("leaves-"))
    assert wait_until(lambda: "running" in machines.monge(0, "jobs", job), timeout=120, interval=2)
    assert "is draining" in machines.monge(0, "drain", second)
    output, _ = node.communicate(timeout=120)
    assert node.returncode == 0, output
    assert output.count("joins the cluster") == 2, output
    assert "raylet ended with code -9" in output
    assert "the node has left the cluster" in output
    assert not machines.alive(1)
    # Ray may count it for some seconds more.
    assert wait_until(lambda: not machines.nodes(), timeout=90)
    assert wait_until(lambda: "running since" not in machines.monge(0, "jobs", job), timeout=120, interval=2)
    machines.monge(0, "cancel", job)

    again = machines.start(1, "node", "join", url, "--cpus", "1")  # with the token of the home
    assert wait_until(lambda: len(machines.nodes()) == 1, timeout=90)
    (program,) = [process for process in machines.alive(1) if "join" in process.cmdline()]
    program.send_signal(signal.SIGTERM)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    assert not machines.alive(1)
    machines.monge(0, "down")
    assert not machines.alive(0)
