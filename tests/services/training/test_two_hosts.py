"""Workers on two hosts whose own name resolves to 127.0.1.1, as Debian and Ubuntu have it: two network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RAY = Path(sys.executable).parent / "ray"
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 6399

DRIVER = """
import json, socket, sys
import ray, torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from pipelines.distributed import agree, gather_rows, rank
from services.training.backend import NodeTorchConfig

def work(config):
    with agree("meeting"):
        met = gather_rows(torch.tensor([rank()])).tolist()
    return {"met": met, "own name": socket.gethostbyname(socket.gethostname())}

kind, address, folder = sys.argv[1:]
ray.init(address, log_to_driver=False)
config = {"node": NodeTorchConfig, "plain": TorchConfig}[kind](backend="gloo", timeout_s=60)
trainer = TorchTrainer(
    work, torch_config=config,
    scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
    run_config=RunConfig(storage_path=folder, name=kind),
)
print("found", json.dumps(trainer.fit().return_value))
"""


def command(*line: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in line], check=check, capture_output=True, text=True, timeout=120)


@dataclass
class Hosts:
    """Two namespaces, joined by a link; each is a Ray node of one CPU."""

    names: list[str]
    folder: Path

    def on(self, host: int, *line: object, timeout: float = 150) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, under a host name of its own."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname host-{host}; exec "$@"', "sh"]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MONGE_"))}
        return subprocess.run(
            ["ip", "netns", "exec", self.names[host], *named, *map(str, line)],
            cwd=self.folder, env=inherited | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def train(self, kind: str) -> subprocess.CompletedProcess[str]:
        return self.on(0, sys.executable, "driver.py", kind, f"{ADDRESSES[0]}:{PORT}", self.folder / "results")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces take root, ip and unshare")
    tag = uuid.uuid4().hex[:6]
    hosts = Hosts([f"monge-{tag}-{host}" for host in range(2)], tmp_path_factory.mktemp("hosts"))
    (hosts.folder / "driver.py").write_text(DRIVER)
    # A short path: sockets lie below it.
    session = Path("/tmp") / f"monge-{tag}"
    try:
        for name in hosts.names:
            if command("ip", "netns", "add", name, check=False).returncode:
                pytest.skip("network namespaces are not allowed here")
        links = [f"mg{tag}{host}" for host in range(2)]
        command("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for host, (name, link) in enumerate(zip(hosts.names, links, strict=True)):
            command("ip", "link", "set", link, "netns", name)
            command("ip", "-n", name, "address", "add", f"{ADDRESSES[host]}/24", "dev", link)
            command("ip", "-n", name, "link", "set", link, "up")
            command("ip", "-n", name, "link", "set", "lo", "up")
            # `ip netns exec` puts it in the place of /etc/hosts.
            there = Path("/etc/netns") / name
            there.mkdir(parents=True)
            (there / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 host-{host}\n")
            (there / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once
        join = (
            ["--head", "--port", PORT, "--temp-dir", session, "--include-dashboard=false"],
            ["--address", f"{ADDRESSES[0]}:{PORT}"],
        )
        for host, options in enumerate(join):
            node = ["--node-ip-address", ADDRESSES[host], "--num-cpus", 1, "--disable-usage-stats"]
            started = hosts.on(host, RAY, "start", *options, *node)
            assert started.returncode == 0, started.stdout + started.stderr
        yield hosts
    finally:
        for name in hosts.names:
            for pid in command("ip", "netns", "pids", name, check=False).stdout.split():
                command("kill", "-9", pid, check=False)
            command("ip", "netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.slow
def test_ranks_meet_on_the_addresses_that_ray_knows(hosts: Hosts) -> None:
    done = hosts.train("node")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    # The last is what gloo takes when it is not told better.
    assert json.loads(line.removeprefix("found ")) == {"met": [0, 1], "own name": "127.0.1.1"}
