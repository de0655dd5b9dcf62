"""Workers on two hosts (network namespaces) whose host name resolves to 127.0.1.1, as on Debian and Ubuntu."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.jobs.living import environment_of
from tests.services.platform.machines import ADDRESSES, Machines, two_machines

RAY = Path(sys.executable).parent / "ray"
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


@dataclass
class Hosts:
    """Two machines, each a Ray node with one CPU."""

    machines: Machines

    def on(self, host: int, *line: object) -> subprocess.CompletedProcess[str]:
        """Run a command on a host with its own host name."""
        return subprocess.run(
            self.machines.line(host, *line), cwd=self.machines.home, env=environment_of(self.machines.home),
            capture_output=True, text=True, timeout=150,
        )  # fmt: skip

    def train(self, kind: str) -> subprocess.CompletedProcess[str]:
        results = self.machines.home / "results"
        return self.on(0, sys.executable, "driver.py", kind, f"{ADDRESSES[0]}:{PORT}", results)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "driver.py").write_text(DRIVER)
    with tempfile.TemporaryDirectory(prefix="ray-") as session, two_machines(folder) as machines:
        hosts = Hosts(machines)
        join = (
            ["--head", "--port", PORT, "--temp-dir", session, "--include-dashboard=false"],
            ["--address", f"{ADDRESSES[0]}:{PORT}"],
        )
        for host, options in enumerate(join):
            node = ["--node-ip-address", ADDRESSES[host], "--num-cpus", 1, "--disable-usage-stats"]
            started = hosts.on(host, RAY, "start", *options, *node)
            assert started.returncode == 0, started.stdout + started.stderr
        yield hosts


@pytest.mark.slow
def test_ranks_meet_on_the_addresses_that_ray_knows(hosts: Hosts) -> None:
    done = hosts.train("node")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    # The last is what gloo takes when it is not told better.
    assert json.loads(line.removeprefix("found ")) == {"met": [0, 1], "own name": "127.0.1.1"}
