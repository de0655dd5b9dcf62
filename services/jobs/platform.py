"""The local platform: Ray, MLflow, the transport service and the endpoint, as processes of this machine.

Each service is started by the command that ``docker-compose.yml`` gives its container. What was started is written to
``platform.json`` in the home folder, where every other command finds the addresses. Ports are the usual ones where
they are free, so that two homes on one machine do not collide.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from pipelines.errors import ServiceError
from services.cluster import TOKEN, make_token, ray_environment
from services.jobs.processes import Started, alone, end, free_port, start, tail, wait_until
from services.settings import LOOPBACK, Settings
from services.tracking.server import server_command, server_environment

FILE = "platform.json"
TRANSPORT_UNITS = 1000
"""How much of the resource ``transport`` this machine offers; the transport service runs where there is some."""

_ORDER = ("ray", "mlflow", "transport", "endpoint")
_START_TIMEOUT = {"ray": 60.0, "mlflow": 90.0, "transport": 90.0, "endpoint": 90.0}


@dataclass
class Platform:
    """What runs, as ``platform.json`` holds it.

    Attributes:
        processes: by name.
        ray_address, ray_dashboard, mlflow_uri, transport_url, endpoint_url: where they listen.
    """

    processes: dict[str, Started] = field(default_factory=dict)
    ray_address: str = ""
    ray_dashboard: str = ""
    mlflow_uri: str = ""
    transport_url: str = ""
    endpoint_url: str = ""

    @classmethod
    def read(cls, home: Path) -> Platform:
        """The platform of a home folder; an empty one where nothing was started."""
        document = dict(Settings(home=home).platform)
        processes = {name: Started(**started) for name, started in document.pop("processes", {}).items()}
        return cls(processes, **document)

    def write(self, home: Path) -> None:
        """Write it down, in one piece."""
        temporary = home / f"{FILE}.part"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(home / FILE)

    def urls(self) -> dict[str, str]:
        """Where a person looks, by service."""
        return {
            "ray": self.ray_dashboard,
            "mlflow": self.mlflow_uri,
            "transport": self.transport_url,
            "endpoint": self.endpoint_url,
        }


@dataclass(frozen=True)
class Health:
    """How a service does.

    Attributes:
        name: of the service.
        url: where it listens.
        healthy: whether it answers.
        pid: of its process, None when it does not run.
    """

    name: str
    url: str
    healthy: bool
    pid: int | None


def up(home: Path, say: Callable[[str], None], cpus: int | None = None) -> Platform:
    """Start what does not run yet, and wait until all of it answers.

    Args:
        home: the folder of everything that Monge writes.
        say: told of each stage.
        cpus: processors that Ray offers to jobs; all of the machine's, and at least 2, by default.

    Raises:
        ServiceError: a service did not start; with the end of its log.
    """
    home = home.absolute()
    make_token(home)
    with alone(home / "platform.lock", f"another `monge up` works in {home}"):
        platform = Platform.read(home)
        services = _services(home, platform, cpus)
        for name in _ORDER:
            started = platform.processes.get(name)
            if started and started.process():
                continue
            if name == "transport":
                # It joins the cluster as soon as it starts.
                _await(home, platform, "ray", say)
            say(f"starting {name}")
            command, environment = services[name]()
            platform.processes[name] = start(command, environment, _log(home, name))
            platform.write(home)
        for name in _ORDER:
            _await(home, platform, name, say)
    return platform


def down(home: Path, say: Callable[[str], None]) -> bool:
    """End what :func:`up` started, and nothing else.

    Returns:
        Whether anything ran.
    """
    platform = Platform.read(home)
    ran = False
    for name in reversed(_ORDER):
        started = platform.processes.get(name)
        if started and started.process():
            say(f"ending {name}")
            ran |= end(started)
    (home / FILE).unlink(missing_ok=True)
    return ran


def status(home: Path) -> list[Health]:
    """How each service does, in the order in which they start."""
    platform = Platform.read(home)
    found = []
    for name in _ORDER:
        started = platform.processes.get(name)
        running = started is not None and started.process() is not None
        url = platform.urls()[name]
        found.append(
            Health(name, url, running and _answers(home, name, url), started.pid if started and running else None)
        )
    return found


def _services(home: Path, platform: Platform, cpus: int | None) -> dict[str, Callable[[], tuple[list[str], dict]]]:
    common = {**ray_environment(Settings(home=home)), "MONGE_HOME": str(home)}

    def ray() -> tuple[list[str], dict[str, str]]:
        port, dashboard = free_port(6379), free_port(8265)
        platform.ray_address, platform.ray_dashboard = f"{LOOPBACK}:{port}", f"http://{LOOPBACK}:{dashboard}"
        # Unix sockets lie below this folder, and their paths may have no more than 107 characters.
        temporary = Path(tempfile.gettempdir(), "monge-" + hashlib.sha256(str(home).encode()).hexdigest()[:8])
        return [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", LOOPBACK, "--port", str(port)),
            *("--dashboard-host", LOOPBACK, "--dashboard-port", str(dashboard)),
            *("--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())),
            # Random worker ports: a range would be shared with another cluster on this machine.
            *("--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", str(temporary)),
            *("--num-cpus", str(cpus or max(2, os.cpu_count() or 1))),
            *("--resources", json.dumps({"transport": TRANSPORT_UNITS})),
            # Ray's own helper actors ask for the state of the cluster: of this one, not of another on this machine.
        ], common | {"RAY_API_SERVER_ADDRESS": platform.ray_dashboard}

    def mlflow() -> tuple[list[str], dict[str, str]]:
        port = free_port(5000)
        platform.mlflow_uri = f"http://{LOOPBACK}:{port}"
        (home / "mlflow").mkdir(parents=True, exist_ok=True)
        command = server_command(
            LOOPBACK, port, f"sqlite:///{home / 'mlflow' / 'mlflow.db'}", home / "mlflow" / "artifacts"
        )
        return command, server_environment()

    def transport() -> tuple[list[str], dict[str, str]]:
        port = free_port(8100)
        platform.transport_url = f"http://{LOOPBACK}:{port}"
        command = [*(sys.executable, "-m", "services.cli", "transport", "serve"), *("--host", LOOPBACK)]
        return [*command, "--port", str(port), "--ray", platform.ray_address], common

    def endpoint() -> tuple[list[str], dict[str, str]]:
        port = free_port(8000)
        platform.endpoint_url = f"http://{LOOPBACK}:{port}"
        command = [*(sys.executable, "-m", "services.cli", "serve"), "--host", LOOPBACK, "--port", str(port)]
        return command, common | {"MONGE_MLFLOW_URI": platform.mlflow_uri}

    return {"ray": ray, "mlflow": mlflow, "transport": transport, "endpoint": endpoint}


def _await(home: Path, platform: Platform, name: str, say: Callable[[str], None]) -> None:
    url = platform.urls()[name]
    process = platform.processes[name]

    def settled() -> bool:
        return _answers(home, name, url) or process.process() is None

    if not _answers(home, name, url):
        say(f"waiting for {name} at {url}")
        wait_until(settled, _START_TIMEOUT[name])
    if not _answers(home, name, url):
        log = _log(home, name)
        raise ServiceError(
            f"{name} did not start; the end of {log}:\n{tail(log)}", cure="`monge down`, then `monge up`"
        )


def _answers(home: Path, name: str, url: str) -> bool:
    paths = {"ray": "/api/version", "mlflow": "/health", "transport": "/health", "endpoint": "/health"}
    headers = {}
    if name == "ray":
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", home / TOKEN))
        headers["Authorization"] = f"Bearer {token.read_text().strip()}" if token.exists() else ""
    try:
        return httpx.get(url + paths[name], headers=headers, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _log(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"
