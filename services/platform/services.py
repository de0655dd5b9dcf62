"""Each service of a machine, described once: its addresses, its health, and the command that starts it.

``docker-compose.yml`` gives its containers the same commands.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.cluster import ray_environment
from services.platform.processes import free_port
from services.settings import LOOPBACK, Settings
from services.tracking.server import server_command, server_environment

TRANSPORT_UNITS = 1000
"""How much of the resource ``transport`` this machine offers; the transport service runs where there is some."""


@dataclass(frozen=True)
class Machine:
    """What the commands of its services are made of.

    Attributes:
        home: the folder of everything that Monge writes.
        addresses: of the services that were started or are about to be, by the name of the setting.
        cpus: processors that Ray offers to jobs; None for all of the machine's, and at least 2.
    """

    home: Path
    addresses: Mapping[str, str]
    cpus: int | None = None

    def port(self, setting: str) -> str:
        """The port of an address."""
        return self.addresses[setting].rpartition(":")[2]

    @property
    def environment(self) -> dict[str, str]:
        """Of every process that joins the cluster."""
        return {**ray_environment(Settings(home=self.home)), "MONGE_HOME": str(self.home)}


Command = tuple[list[str], dict[str, str]]
"""A command line, and what its environment has beyond this process's own."""


@dataclass(frozen=True)
class Service:
    """One service.

    Attributes:
        name: of the service.
        ports: the usual port of each address, by the name of the setting.
        url: the setting whose address a person opens.
        health: path that answers 200 where the service is well.
        patience: seconds that it may take to start.
        command: what starts it.
        after: name of the service that has to answer before.
    """

    name: str
    ports: Mapping[str, int]
    url: str
    health: str
    patience: float
    command: Callable[[Machine], Command]
    after: str | None = None


def address(setting: str, port: int) -> str:
    """An address on this machine, as the setting takes it."""
    return f"{LOOPBACK}:{port}" if setting == "ray_address" else f"http://{LOOPBACK}:{port}"


def _ray(machine: Machine) -> Command:
    # Unix sockets lie below this folder, and their paths may have no more than 107 characters.
    temporary = Path(tempfile.gettempdir(), "monge-" + hashlib.sha256(str(machine.home).encode()).hexdigest()[:8])
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", LOOPBACK, "--port", machine.port("ray_address")),
        *("--dashboard-host", LOOPBACK, "--dashboard-port", machine.port("ray_dashboard")),
        *("--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())),
        # Random worker ports: a range would be shared with another cluster on this machine.
        *("--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", str(temporary)),
        *("--num-cpus", str(machine.cpus or max(2, os.cpu_count() or 1))),
        *("--resources", json.dumps({"transport": TRANSPORT_UNITS})),
        # Ray's own helper actors ask for the state of the cluster: of this one, not of another on this machine.
    ], machine.environment | {"RAY_API_SERVER_ADDRESS": machine.addresses["ray_dashboard"]}


def _mlflow(machine: Machine) -> Command:
    folder = machine.home / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    store, port = f"sqlite:///{folder / 'mlflow.db'}", int(machine.port("mlflow_uri"))
    return server_command(LOOPBACK, port, store, folder / "artifacts"), server_environment()


def _transport(machine: Machine) -> Command:
    command = [*(sys.executable, "-m", "services.cli", "transport", "serve"), *("--host", LOOPBACK)]
    ray = machine.addresses["ray_address"]
    return [*command, "--port", machine.port("transport_url"), "--ray", ray], machine.environment


def _endpoint(machine: Machine) -> Command:
    command = [*(sys.executable, "-m", "services.cli", "serve"), "--host", LOOPBACK]
    environment = machine.environment | {"MONGE_MLFLOW_URI": machine.addresses["mlflow_uri"]}
    return [*command, "--port", machine.port("endpoint_url")], environment


def _jobs(machine: Machine) -> Command:
    command = [*(sys.executable, "-m", "services.jobs"), *("--host", LOOPBACK)]
    elsewhere = {f"MONGE_{name.upper()}": machine.addresses[name] for name in ("ray_dashboard", "mlflow_uri")}
    environment = machine.environment | elsewhere | {"MONGE_JOB_PYTHON": sys.executable}
    return [*command, "--port", machine.port("jobs_url")], environment


SERVICES = (
    Service("ray", {"ray_address": 6379, "ray_dashboard": 8265}, "ray_dashboard", "/api/version", 60, _ray),
    Service("mlflow", {"mlflow_uri": 5000}, "mlflow_uri", "/health", 90, _mlflow),
    Service("transport", {"transport_url": 8100}, "transport_url", "/health", 90, _transport, after="ray"),
    Service("endpoint", {"endpoint_url": 8000}, "endpoint_url", "/health", 90, _endpoint),
    Service("jobs", {"jobs_url": 8200}, "jobs_url", "/ready", 60, _jobs),
)
"""In the order in which they start."""
