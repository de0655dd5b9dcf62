"""A platform of two machines that share a home folder: two network namespaces, joined by a link."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from services.platform.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
ADDRESSES = ("10.213.79.1", "10.213.79.2")
JOB = ["submit", "configs/perceptron.yaml", "--set", "data.source=digits", "--set", "workers.count=2"]


def command(*line: object, check: bool = True) -> str:
    done = subprocess.run([str(part) for part in line], check=check, capture_output=True, text=True, timeout=60)
    return "" if done.returncode else done.stdout


@dataclass
class Machines:
    """Two namespaces, each with a host name and an address of its own."""

    names: list[str]
    home: Path

    def start(self, machine: int, *arguments: str, **options: int) -> subprocess.Popen[str]:
        """Start the `monge` command on a machine."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MONGE_"))}
        settings = {"MONGE_HOME": str(self.home), "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"}
        named = ["unshare", "--uts", "sh", "-c", f'hostname machine-{machine}; exec "$@"', "sh"]
        monge = [sys.executable, "-m", "services.cli", *arguments]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[machine], *named, *monge],
            cwd=ROOT, env=inherited | settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
        )  # fmt: skip

    def monge(self, machine: int, *arguments: str, fails: bool = False) -> str:
        process = self.start(machine, *arguments)
        output, _ = process.communicate(timeout=300)
        assert (process.returncode != 0) == fails, output
        return output

    def alive(self, machine: int) -> list[psutil.Process]:
        pids = command("ip", "netns", "pids", self.names[machine], check=False).split()
        return [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]

    def nodes(self) -> list[str]:
        """The ids of the nodes that run on the second machine."""
        output = self.monge(0, "nodes")
        return [row.split("│")[1].strip() for row in output.splitlines() if ADDRESSES[1] in row]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces take root, ip and unshare")
    tag = uuid.uuid4().hex[:6]
    machines = Machines([f"monge-{tag}-{machine}" for machine in range(2)], tmp_path / "home")
    try:
        for name in machines.names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=60).returncode:
                pytest.skip("network namespaces are not allowed here")
        links = [f"mg{tag}{machine}" for machine in range(2)]
        command("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for machine, (name, link) in enumerate(zip(machines.names, links, strict=True)):
            command("ip", "link", "set", link, "netns", name)
            command("ip", "-n", name, "address", "add", f"{ADDRESSES[machine]}/24", "dev", link)
            for up in (link, "lo"):
                command("ip", "-n", name, "link", "set", up, "up")
            # `ip netns exec` puts it in the place of /etc/hosts.
            there = Path("/etc/netns") / name
            there.mkdir(parents=True)
            (there / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 machine-{machine}\n")
            (there / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once
        yield machines
    finally:
        for machine, name in enumerate(machines.names):
            for process in machines.alive(machine):
                process.kill()
            command("ip", "netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def test_a_second_machine_joins_trains_comes_again_and_is_drained(machines: Machines) -> None:
    told = machines.monge(0, "up", "--host", ADDRESSES[0], "--cpus", "1")
    assert "asks for no token: keep its port behind a firewall" in told
    url = f"http://{ADDRESSES[0]}:8200"
    assert f"monge node join {url} --token" in told
    assert machines.monge(0, "status").count("answers") == 5

    refused = machines.monge(1, "node", "join", url, "--token", "guessed", fails=True)
    assert "a token that is not valid" in refused
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
    assert "drains" in machines.monge(0, "drain", second)
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
