"""The services of this machine, as processes of it: started, looked at, ended.

What was started is written to ``platform.json`` in the home folder, where every other command finds the addresses.
Ports are the usual ones where they are free, so that two homes on one machine do not collide, and then stay: they are
kept in ``ports.json``, for running jobs and bookmarks know them. So is the address on which all listen, in ``host``.
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
"""Times that a service is started that ends at once, as one does whose port was taken meanwhile."""


@dataclass
class Platform:
    """What was started here, as ``platform.json`` holds it.

    Attributes:
        processes: by the name of the service.
        addresses: where they listen, by the name of the setting.
    """

    processes: dict[str, Started] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, home: Path) -> Platform:
        """The platform of a home folder; an empty one where nothing was started."""
        document = dict(Settings(home=home).platform)
        processes = {name: Started(**started) for name, started in document.pop("processes", {}).items()}
        return cls(processes, document)

    def write(self, home: Path) -> None:
        """Write it down, in one piece."""
        _write(
            home / FILE, {"processes": {name: asdict(one) for name, one in self.processes.items()}, **self.addresses}
        )


@dataclass(frozen=True)
class Health:
    """How a service does.

    Attributes:
        name: of the service.
        url: where it listens; None where no address is known.
        healthy: whether it answers.
        pid: of its process on this machine, None where it does not run here.
        named_by: the environment variable that says where it is, None where this home's platform does.
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
    """Start what does not run yet, and wait until all of it answers.

    What had joined a cluster that is gone is started again with the new one.

    Args:
        home: the folder of everything that Monge writes.
        say: told of each stage.
        cpus: processors that Ray offers to jobs; all of the machine's, and at least 2, by default.
        host: address on which all of it listens; where it did before by default, at first 127.0.0.1.
        storage: address in S3 of data sets and checkpoints; where they were before by default, at first the home.

    Raises:
        SpecError: the host is no address of this machine.
        ConflictError: services run that listen on another one, or what there is lies in another storage.
        ServiceError: a service did not start; with the end of its log.
    """
    home = home.absolute()
    make_token(home)
    make_home_id(home)
    with alone(home / "platform.lock", f"another `monge up` works in {home}"):
        platform = Platform.read(home)
        _remember(home, platform, host)
        _remember_storage(home, storage)
        for service in SERVICES:
            started = platform.processes.get(service.name)
            if started and started.process():
                joined = platform.processes.get(service.after or "")
                if joined is None or joined.born <= started.born:
                    continue
                say(f"ending {service.name}, which knows another {service.after}")
                end(started)
            for before in SERVICES:
                if before.name == service.after:
                    _await(home, platform, before, say, cpus)
            _start(home, platform, service, say, cpus)
        for service in SERVICES:
            _await(home, platform, service, say, cpus)
    return platform


def down(home: Path, say: Callable[[str], None]) -> bool:
    """End what :func:`up` started, and nothing else.

    Returns:
        Whether anything ran.
    """
    platform = Platform.read(home)
    ran = False
    for service in reversed(SERVICES):
        started = platform.processes.get(service.name)
        if started and started.process():
            say(f"ending {service.name}")
            ran |= end(started)
    (home / FILE).unlink(missing_ok=True)
    return ran


def status(settings: Settings) -> list[Health]:
    """How each service does, here or where the settings say, in the order in which they start.

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
    """The address on which the services of a home listen."""
    try:
        return (home / HOST).read_text().strip() or LOOPBACK
    except FileNotFoundError:
        return LOOPBACK


def advice(home: Path, platform: Platform) -> list[str]:
    """What a person needs to know of a platform that other machines reach."""
    return [
        f"warning: MLflow at {platform.addresses['mlflow_uri']} asks for no token: keep its port behind a firewall",
        f"the other services ask for one: `monge token create`; the owner's is in {home.absolute() / 'token'}",
        f"on the next machine, which sees {home.absolute()} under the same path:",
        f"  MONGE_TOKEN=$(cat {home.absolute() / 'token'}) monge node join {platform.addresses['jobs_url']}",
    ]


def _remember_storage(home: Path, storage: str | None) -> None:
    """Keep where data sets and checkpoints are: a start without the setting would begin all jobs anew."""
    kept = kept_storage(home)
    if kept and storage and kept != storage:
        raise ConflictError(
            f"MONGE_STORAGE: {storage}, while the jobs of {home} have their checkpoints in {kept}",
            hint="leave it unset, or take another MONGE_HOME",
        )
    if storage and not kept:
        (home / STORAGE).write_text(storage + "\n")


def _remember(home: Path, platform: Platform, host: str | None) -> None:
    """Keep the address on which all is to listen, once that is found possible."""
    wanted = host or kept_host(home)
    require_own(wanted)
    for service in SERVICES:
        started, known = platform.processes.get(service.name), platform.addresses.get(service.url)
        if started and started.process() and known and host_of(known) != wanted:
            raise ConflictError(
                f"host: {wanted} asked for, {service.name} listens on {host_of(known)}",
                hint=f"`monge down`, then `monge up --host {wanted}`",
            )
    if wanted != kept_host(home):
        (home / HOST).write_text(wanted + "\n")


def _addresses(home: Path, service: Service, say: Callable[[str], None]) -> dict[str, str]:
    """Where a service is to listen: where it did before, if that is free."""
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
        return {}  # they are chosen anew


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
            break  # and is silent, which it would be again
        if further:
            _start(home, platform, service, say, cpus)
    log = _log(home, service)
    raise ServiceError(
        f"{service.name} did not start; the end of {log}:\n{tail(log)}", hint="`monge down`, then `monge up`"
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
