"""Services of this machine as processes: start, check and stop them.

``platform.json`` in the home folder lists the processes and their addresses; other commands read the addresses from
it. Default ports are used if they are free. ``ports.json`` keeps the chosen ports, because running jobs and bookmarks
refer to them, and ``host`` keeps the address on which all services listen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from pipelines.errors import ConflictError, ServiceError
from services.cluster import make_token, read_token
from services.jobs.joining import make_home_id
from services.locks import alone
from services.platform.processes import Started, end, free_port, start_process, tail, wait_until
from services.platform.services import SERVICES, Machine, Service, address, host_of, require_own
from services.settings import LOOPBACK, STORAGE, Settings, kept_storage

FILE = "platform.json"
PORTS = "ports.json"
HOST = "host"
STARTS = 3
"""Maximum number of starts of a service that exits at once, for example because its port was taken in between."""


@dataclass
class Platform:
    """Services started on this machine, as stored in ``platform.json``.

    Attributes:
        processes: processes by name of the service.
        addresses: addresses by name of the setting.
    """

    processes: dict[str, Started] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, home: Path) -> Platform:
        """Return the platform of a home folder; empty if nothing was started."""
        document = dict(Settings(home=home).platform)
        processes = {name: Started(**started) for name, started in document.pop("processes", {}).items()}
        return cls(processes, document)

    def write(self, home: Path) -> None:
        """Write ``platform.json`` atomically."""
        _write(
            home / FILE, {"processes": {name: asdict(one) for name, one in self.processes.items()}, **self.addresses}
        )


@dataclass(frozen=True)
class Health:
    """Health of a service.

    Attributes:
        name: name of the service.
        url: URL of the service; None if not known.
        healthy: whether the service responds.
        pid: pid on this machine; None if the service does not run here.
        named_by: environment variable that sets the address; None if the local platform does.
    """

    name: str
    url: str | None
    healthy: bool
    pid: int | None
    named_by: str | None = None


def up(
    home: Path,
    say: Callable[[str], None],
    cpus: int | None = None,
    host: str | None = None,
    storage: str | None = None,
) -> Platform:
    """Start the services that are not running, and wait until all respond.

    Services that joined a cluster that is gone are restarted with the new one.

    Args:
        home: home folder of Monge.
        say: called with a line of text at each stage.
        cpus: number of CPUs for jobs; by default all of this machine, and at least 2.
        host: address on which all services listen; by default the previous one, at first 127.0.0.1.
        storage: S3 address of data sets and checkpoints; by default the previous one, at first the home folder.

    Raises:
        SpecError: ``host`` is not an address of this machine.
        ConflictError: services run that listen on another one, or what there is lies in another storage.
        ServiceError: a service did not start; the message includes the end of its log.
    """
    home = home.absolute()
    make_token(home)
    make_home_id(home)
    with alone(home / "platform.lock", f"another `monge up` is running in {home}"):
        platform = Platform.read(home)
        _remember(home, platform, host)
        _remember_storage(home, storage)
        for service in SERVICES:
            started = platform.processes.get(service.name)
            if started and started.process():
                joined = platform.processes.get(service.after or "")
                if joined is None or joined.born <= started.born:
                    continue
                say(f"stopping {service.name}, which uses an earlier {service.after}")
                end(started)
            for before in SERVICES:
                if before.name == service.after:
                    _await(home, platform, before, say, cpus)
            _start(home, platform, service, say, cpus)
        for service in SERVICES:
            _await(home, platform, service, say, cpus)
    return platform


def down(home: Path, say: Callable[[str], None]) -> bool:
    """Stop the services that :func:`up` started.

    Returns:
        Whether any service was running.
    """
    platform = Platform.read(home)
    ran = False
    for service in reversed(SERVICES):
        started = platform.processes.get(service.name)
        if started and started.process():
            say(f"stopping {service.name}")
            ran |= end(started)
    (home / FILE).unlink(missing_ok=True)
    return ran


def status(settings: Settings) -> list[Health]:
    """Return the health of each service, local or at its configured address, in start order.

    Raises:
        ServiceError: ``platform.json`` is damaged.
    """
    platform = Platform.read(settings.home)
    found = []
    for service in SERVICES:
        elsewhere = getattr(settings, service.url)
        url = elsewhere or platform.addresses.get(service.url)
        started = None if elsewhere else platform.processes.get(service.name)
        pid = started.pid if started and started.process() else None
        healthy = url is not None and _answers(settings.home, service, url)
        found.append(Health(service.name, url, healthy, pid, f"MONGE_{service.url.upper()}" if elsewhere else None))
    return found


def kept_host(home: Path) -> str:
    """Return the address on which the services of a home folder listen."""
    try:
        return (home / HOST).read_text().strip() or LOOPBACK
    except FileNotFoundError:
        return LOOPBACK


def advice(home: Path, platform: Platform) -> list[str]:
    """Return instructions for a platform that other machines can reach."""
    return [
        f"warning: MLflow at {platform.addresses['mlflow_uri']} requires no token: keep its port behind a firewall",
        f"the other services require one: `monge token create`; the owner's token is in {home.absolute() / 'token'}",
        f"on another machine that mounts {home.absolute()} under the same path:",
        f"  MONGE_TOKEN=$(cat {home.absolute() / 'token'}) monge node join {platform.addresses['jobs_url']}",
    ]


def _remember_storage(home: Path, storage: str | None) -> None:
    """Store the address of data sets and checkpoints; a start without it would restart all jobs from the beginning."""
    kept = kept_storage(home)
    if kept and storage and kept != storage:
        raise ConflictError(
            f"MONGE_STORAGE: {storage}, but the checkpoints in {home} are stored in {kept}",
            hint="unset it, or use another MONGE_HOME",
        )
    if storage and not kept:
        (home / STORAGE).write_text(storage + "\n")


def _remember(home: Path, platform: Platform, host: str | None) -> None:
    """Store the address on which all services listen, after checking that it can be used."""
    wanted = host or kept_host(home)
    require_own(wanted)
    for service in SERVICES:
        started, known = platform.processes.get(service.name), platform.addresses.get(service.url)
        if started and started.process() and known and host_of(known) != wanted:
            raise ConflictError(
                f"host: {wanted} requested, but {service.name} listens on {host_of(known)}",
                hint=f"run `monge down`, then `monge up --host {wanted}`",
            )
    if wanted != kept_host(home):
        (home / HOST).write_text(wanted + "\n")


def _addresses(home: Path, service: Service, say: Callable[[str], None]) -> dict[str, str]:
    """Return the addresses of a service: the previous ones if they are free."""
    kept, host = _kept(home), kept_host(home)
    chosen = {}
    for setting, usual in service.ports.items():
        before = kept.get(setting)
        chosen[setting] = free_port(before or usual, host)
        if before not in (None, chosen[setting]):
            say(f"port {before} of {service.name} is taken: running jobs do not know {chosen[setting]}")
    _write(home / PORTS, kept | chosen)
    return {setting: address(setting, port, host) for setting, port in chosen.items()}


def _kept(home: Path) -> dict[str, int]:
    try:
        ports = json.loads((home / PORTS).read_text())
        return {str(setting): int(port) for setting, port in ports.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # choose new ones


def _write(path: Path, document: Mapping[str, object]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def _start(home: Path, platform: Platform, service: Service, say: Callable[[str], None], cpus: int | None) -> None:
    platform.addresses |= _addresses(home, service, say)
    say(f"starting {service.name}")
    command, environment = service.command(Machine(home, platform.addresses, cpus, kept_host(home)))
    platform.processes[service.name] = start_process(command, environment, _log(home, service))
    platform.write(home)


def _await(home: Path, platform: Platform, service: Service, say: Callable[[str], None], cpus: int | None) -> None:
    def runs() -> bool:
        return platform.processes[service.name].process() is not None

    def answers() -> bool:
        return runs() and _answers(home, service, platform.addresses[service.url])

    for further in reversed(range(STARTS)):
        if answers():
            return
        say(f"waiting for {service.name} at {platform.addresses[service.url]}")
        wait_until(lambda: answers() or not runs(), service.patience)
        if answers():
            return
        if runs():
            break  # alive but does not respond: a restart would not help
        if further:
            _start(home, platform, service, say, cpus)
    log = _log(home, service)
    raise ServiceError(
        f"{service.name} did not start; the end of {log}:\n{tail(log)}", hint="run `monge down`, then `monge up`"
    )


def _answers(home: Path, service: Service, url: str) -> bool:
    headers = {"Authorization": f"Bearer {token}"} if service.name == "ray" and (token := read_token(home)) else {}
    try:
        answer = httpx.get(url.rstrip("/") + service.health, headers=headers, timeout=2, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return answer.status_code == 200


def _log(home: Path, service: Service) -> Path:
    return home / "logs" / f"{service.name}.log"
