"""Two machines with a shared home folder: network namespaces connected by a link that can be cut."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.services.jobs.living import ROOT, environment_of

ADDRESSES = ("10.213.79.1", "10.213.79.2")

NEWNET = 0x40000000
"""CLONE_NEWNET of setns(2)."""


def command(*line: object, check: bool = True) -> str:
    done = subprocess.run([str(part) for part in line], check=check, capture_output=True, text=True, timeout=60)
    return "" if done.returncode else done.stdout


@dataclass
class Machines:
    """Two namespaces, each with its own host name and address.

    Attributes:
        names: names of the namespaces.
        links: names of the two ends of the link.
        home: the shared folder.
        environment: additional environment variables of all commands.
    """

    names: list[str]
    links: list[str]
    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def line(self, machine: int, *command: object) -> list[str]:
        """Return the command line that runs a command on a machine with its host name."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname machine-{machine}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.names[machine], *named, *map(str, command)]

    def start(self, machine: int, *arguments: str, **options: int) -> subprocess.Popen[str]:
        """Start the `monge` command on a machine."""
        return subprocess.Popen(
            self.line(machine, sys.executable, "-m", "services.cli", *arguments),
            cwd=ROOT, env={**environment_of(self.home), **self.environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
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
        """Return the ids of the nodes on the second machine."""
        output = self.monge(0, "nodes")
        return [row.split("│")[1].strip() for row in output.splitlines() if ADDRESSES[1] in row]

    @contextmanager
    def inside(self, machine: int) -> Iterator[None]:
        """Open the sockets of this thread in the namespace of a machine."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(there: int) -> None:
            if libc.setns(there, NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

        before = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.names[machine]}", os.O_RDONLY)
        try:
            enter(there)
            yield
        finally:
            enter(before)
            os.close(before)
            os.close(there)

    def cut(self) -> None:
        """Drop all packets between the machines without an error on either side, like a failed switch."""
        for name, link in zip(self.names, self.links, strict=True):
            command("tc", "-n", name, "qdisc", "add", "dev", link, "root", "blackhole")

    def mend(self) -> None:
        """Stop dropping packets."""
        for name, link in zip(self.names, self.links, strict=True):
            command("tc", "-n", name, "qdisc", "del", "dev", link, "root")


@contextmanager
def two_machines(home: Path, environment: Mapping[str, str] | None = None) -> Iterator[Machines]:
    """Yield two machines, and stop all their processes at the end; skip the test if namespaces are not permitted.

    Args:
        home: shared folder.
        environment: additional environment variables of their commands.
    """
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare"))):
        pytest.skip("network namespaces take root, ip and unshare")
    tag = uuid.uuid4().hex[:6]
    names, links = ([f"{kind}{tag}{machine}" for machine in range(2)] for kind in ("monge-", "mg"))
    machines = Machines(names, links, home, environment or {})
    try:
        for name in machines.names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=60).returncode:
                pytest.skip("network namespaces are not allowed here")
        command("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for machine, (name, link) in enumerate(zip(names, links, strict=True)):
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
