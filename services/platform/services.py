"""The services of a machine: their addresses, health checks and start commands.

The containers in ``docker-compose.yml`` use the same commands.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import SpecError
from services.cluster import ray_environment
from services.http import is_loopback
from services.platform.processes import free_port
from services.settings import LOOPBACK, Settings
from services.tracking.server import server_command, server_environment

TRANSPORT_UNITS = 1000
"""Amount of the resource ``transport`` on this machine; solvers run on nodes that offer it."""


@dataclass(frozen=True)
class Machine:
    """Parameters of the start commands.

    Attributes:
        home: home folder of Monge.
        addresses: addresses of the services, by name of the setting.
        cpus: number of CPUs for jobs; None for all of this machine, and at least 2.
        host: address on which all services listen.
    """

    home: Path
    addresses: Mapping[str, str]
    cpus: int | None = None
    host: str = LOOPBACK

    def port(self, setting: str) -> str:
        """Return the port of an address."""
        return self.addresses[setting].rpartition(":")[2]

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of processes that join the cluster."""
        return {**ray_environment(Settings(home=self.home), self.host), "MONGE_HOME": str(self.home)}


Command = tuple[list[str], dict[str, str]]
"""Command line, and additions to the environment of this process."""


@dataclass(frozen=True)
class Service:
    """A service of the platform.

    Attributes:
        name: name of the service.
        ports: default ports, by name of the setting.
        url: name of the setting with the URL for users.
        health: path that returns 200 if the service is healthy.
        patience: time limit for the start, in seconds.
        command: function that returns the start command.
        after: name of the service that must respond first.
    """

    name: str
    ports: Mapping[str, int]
    url: str
    health: str
    patience: float
    command: Callable[[Machine], Command]
    after: str | None = None


def address(setting: str, port: int, host: str = LOOPBACK) -> str:
    """Return an address on this machine in the form of the setting."""
    return f"{host}:{port}" if setting == "ray_address" else f"http://{host}:{port}"


def host_of(address: str) -> str:
    """Return the host of an address from :func:`address`."""
    return address.rpartition(":")[0].rpartition("/")[2]


def require_own(host: str) -> None:
    """Check that services can listen on an address and be reached under it.

    Raises:
        SpecError: ``host`` is not a single IPv4 address of this machine.
    """
    hint = "use an address of this machine that the others reach, such as 10.0.0.1; `ip -4 address` lists them"
    try:
        is_one = not ipaddress.IPv4Address(host).is_unspecified
    except ValueError:
        is_one = False
    if not is_one:
        raise SpecError(f"host: {host!r} is not one IPv4 address", hint=hint)
    try:
        socket.create_server((host, 0)).close()
    except OSError as error:
        raise SpecError(f"host: {host} is not an address of this machine ({error.strerror})", hint=hint) from None


def _ray(machine: Machine) -> Command:
    # Unix sockets are below this folder, and their paths are limited to 107 characters.
    temporary = Path(tempfile.gettempdir(), "monge-" + hashlib.sha256(str(machine.home).encode()).hexdigest()[:8])
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", machine.host, "--port", machine.port("ray_address")),
        *("--dashboard-host", machine.host, "--dashboard-port", machine.port("ray_dashboard")),
        *("--dashboard-agent-listen-port", str(free_port(host=machine.host))),
        *("--ray-client-server-port", str(free_port(host=machine.host))),
        # Use random worker ports: a fixed range would clash with another cluster on this machine.
        *("--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", str(temporary)),
        *("--num-cpus", str(machine.cpus or max(2, os.cpu_count() or 1))),
        *("--resources", json.dumps({"transport": TRANSPORT_UNITS})),
        # Ray's helper actors query the state of the cluster: use this one, not another on this machine.
    ], machine.environment | {"RAY_API_SERVER_ADDRESS": machine.addresses["ray_dashboard"]}


def _mlflow(machine: Machine) -> Command:
    folder = machine.home / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    store, port = f"sqlite:///{folder / 'mlflow.db'}", int(machine.port("mlflow_uri"))
    command, environment = server_command(machine.host, port, store, folder / "artifacts"), server_environment()
    if not is_loopback(machine.host) and "MLFLOW_SERVER_ALLOWED_HOSTS" not in environment:
        # On other addresses MLflow accepts only private host names, and only pages from loopback.
        names = [f"{name}{ports}" for name in ("localhost", LOOPBACK, machine.host) for ports in ("", ":*")]
        command += ["--allowed-hosts", ",".join(names), "--cors-allowed-origins", machine.addresses["mlflow_uri"]]
    return command, environment


def _transport(machine: Machine) -> Command:
    command = [*(sys.executable, "-m", "services.cli", "transport", "serve"), *("--host", machine.host)]
    ray = machine.addresses["ray_address"]
    return [*command, "--port", machine.port("transport_url"), "--ray", ray], machine.environment


def _endpoint(machine: Machine) -> Command:
    command = [*(sys.executable, "-m", "services.cli", "serve"), "--host", machine.host]
    environment = machine.environment | {"MONGE_MLFLOW_URI": machine.addresses["mlflow_uri"]}
    return [*command, "--port", machine.port("endpoint_url")], environment


def _jobs(machine: Machine) -> Command:
    command = [*(sys.executable, "-m", "services.jobs"), *("--host", machine.host)]
    elsewhere = {f"MONGE_{name.upper()}": machine.addresses[name] for name in ("ray_dashboard", "mlflow_uri")}
    environment = machine.environment | elsewhere | {"MONGE_JOB_PYTHON": sys.executable}
    return [*command, "--port", machine.port("jobs_url")], environment


SERVICES = (
    Service("ray", {"ray_address": 6379, "ray_dashboard": 8265}, "ray_dashboard", "/api/version", 60, _ray),
    Service("mlflow", {"mlflow_uri": 5000}, "mlflow_uri", "/health", 90, _mlflow),
    # First, because the other servers check tokens with it.
    Service("jobs", {"jobs_url": 8200}, "jobs_url", "/ready", 60, _jobs),
    Service("transport", {"transport_url": 8100}, "transport_url", "/health", 90, _transport, after="ray"),
    Service("endpoint", {"endpoint_url": 8000}, "endpoint_url", "/health", 90, _endpoint),
)
"""In start order."""
