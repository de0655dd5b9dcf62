"""This machine as a node of a cluster: checks, joining, monitoring and rejoining."""

from __future__ import annotations

import ctypes
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from pipelines.errors import ConflictError, ForbiddenError, MongeError, ServiceError, UnauthenticatedError
from services.cluster import CONNECT_SECONDS, ray_environment
from services.jobs.client import Jobs
from services.jobs.documents import Joining
from services.jobs.joining import HOME_ID, read_home_id, versions
from services.platform.processes import free_port, signal_one, start_process
from services.platform.services import Command, require_own
from services.settings import Settings
from services.storage.s3 import require_credentials

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a node is restarted, doubled each time, and their upper bound."""

STEADY = 60.0
"""Seconds after which a node counts as stable, so that the next pause is the first one again."""

LEAVING = 15.0
"""Seconds without a raylet after which the node counts as ended on request: after a failure `ray start` exits at
once, but after a drain it keeps running."""

GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""

SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2)."""

FINAL = (ConflictError, UnauthenticatedError, ForbiddenError)
"""Errors that a retry would not resolve."""


def join(settings: Settings, say: Callable[[str], None], cpus: int | None = None, host: str | None = None) -> None:
    """Run a node until it is drained, or SIGTERM or SIGINT arrives; then end its processes.

    Args:
        settings: settings with the URL of the job service and an administrator's token.
        say: called with a line of text at each start and end.
        cpus: number of CPUs for jobs; by default Ray's count.
        host: address of this machine; by default the one that reaches the head.

    Raises:
        MongeError: :func:`check` fails at the first start, or later with an error that a retry would not resolve.
    """
    pause, first = FIRST_PAUSE / 2, True
    with _family() as end_all:
        while True:
            began = time.monotonic()
            try:
                offer = ask(settings)
                own = check(offer, settings, host)
            except MongeError as error:
                if first or isinstance(error, FINAL):
                    raise
                why = str(error.args[0])
            else:
                if first:
                    for line in unreachable(offer):
                        say(line)
                found = _live(offer, home_of(offer, settings), own, cpus, say, end_all)
                if found is None:
                    say(f"{_now()} the node has left the cluster: it was drained, or stopped by its administrator")
                    return
                why = found
            first = False
            lived = time.monotonic() - began
            pause = next_pause(pause, lived)
            say(f"{_now()} {why}; joining again in {pause:g} s")
            time.sleep(pause)


def next_pause(before: float, lived: float) -> float:
    """Return the seconds before the next start, after a node that lived for ``lived`` seconds."""
    return FIRST_PAUSE if lived >= STEADY else min(2 * before, LONGEST_PAUSE)


def ask(settings: Settings) -> Joining:
    """Return the parameters for joining, from the head's job service.

    Raises:
        UnauthenticatedError, ForbiddenError: the token is invalid or not an administrator's.
        ConflictError: the head listens on loopback only.
        ServiceError: the job service is unreachable.
    """
    try:
        with Jobs(settings) as jobs:
            return jobs.joining()
    except ServiceError as error:
        if not isinstance(error.__cause__, httpx.HTTPError):
            raise
        hint = "check `monge status` on the head, and that this machine can reach that port"
        raise ServiceError(str(error.args[0]), hint=hint) from error.__cause__


def check(offer: Joining, settings: Settings, host: str | None = None) -> str:
    """Check that this machine can be a node.

    Args:
        offer: parameters from the head.
        settings: settings of this machine.
        host: address of this machine, or None.

    Returns:
        Address of this machine.

    Raises:
        ConflictError: versions differ, or the home folder is not that of the head and there is no S3 storage.
        StorageError: this machine has no keys for the S3 storage.
        SpecError: ``host`` is not an address of this machine.
        ServiceError: the head of the cluster is unreachable.
    """
    for name, here in versions().items():
        if (there := offer.versions.get(name)) != here:
            raise ConflictError(f"{name} {here} here, {there} on the head", hint=f"install {name} {there} here")
    if offer.storage is None:
        _require_home(offer, settings)
    else:
        _require_keys(offer.storage, settings)
    if host is not None:
        require_own(host)
    head, _, port = offer.ray_address.rpartition(":")
    try:
        socket.create_connection((head, int(port)), timeout=CONNECT_SECONDS).close()
        return host or own_address(head, int(port))
    except OSError as error:
        raise ServiceError(
            f"the Ray head at {offer.ray_address} is unreachable: {error}",
            hint="check `monge status` on the head; nodes must reach each other on all ports",
        ) from None


def _require_home(offer: Joining, settings: Settings) -> None:
    theirs = Path(offer.home)
    if "home" in settings.model_fields_set and settings.home.absolute() != theirs:
        raise ConflictError(
            f"MONGE_HOME: {settings.home.absolute()} here, {theirs} on the head; jobs refer to files by path",
            hint=f"mount the head's folder as {theirs} here, and unset MONGE_HOME",
        )
    if not (found := read_home_id(theirs)):  # not mounted, or not yet
        raise ServiceError(
            f"{theirs / HOME_ID} cannot be read here",
            hint=f"mount the head's folder as {theirs} here, for example by NFS",
        )
    if found != offer.home_id:
        raise ConflictError(
            f"{theirs} is not the head's home folder: {HOME_ID} is {found} here, {offer.home_id} there",
            hint=f"mount the head's folder as {theirs} here, for example by NFS",
        )


def _require_keys(storage: str, settings: Settings) -> None:
    if settings.storage not in (None, storage):
        raise ConflictError(f"MONGE_STORAGE: {settings.storage} here, {storage} on the head", hint="unset it here")
    require_credentials(storage, settings)


def home_of(offer: Joining, settings: Settings) -> Path:
    """Return the home folder of the node: the head's, or a local one if nodes share S3."""
    return Path(offer.home) if offer.storage is None else settings.home.absolute()


def own_address(head: str, port: int) -> str:
    """Return the address from which this machine reaches another one, without sending data."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, port))
        return str(probe.getsockname()[0])


def unreachable(offer: Joining) -> Iterator[str]:
    """Yield a warning for each service that workers on this machine need and that is unreachable."""
    for url in filter(None, (offer.mlflow_uri, offer.transport_url)):
        try:
            httpx.get(url.rstrip("/") + "/health", timeout=CONNECT_SECONDS, trust_env=False)
        except httpx.HTTPError as error:
            yield f"warning: {url} is unreachable from here, and jobs on this node need it: {error}"


def node_command(offer: Joining, home: Path, own: str, cpus: int | None) -> Command:
    """Return the command that starts the node."""
    environment = ray_environment(Settings(home=home), offer.ray_address) | {"MONGE_HOME": str(home)}
    if offer.storage:
        environment["MONGE_STORAGE"] = offer.storage
    if offer.ray_token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": offer.ray_token}
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--address", offer.ray_address, "--block"),
        *("--node-ip-address", own, "--disable-usage-stats"),
        *("--dashboard-agent-listen-port", str(free_port(host=own))),
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *(() if cpus is None else ("--num-cpus", str(cpus))),
    ], environment


def _live(
    offer: Joining, home: Path, own: str, cpus: int | None, say: Callable[[str], None], end_all: Callable[[], None]
) -> str | None:
    """Run a node once; return why it ended, or None if it was asked to end."""
    log = home / "logs" / f"node-{own}.log"
    written = log.stat().st_size if log.exists() else 0
    say(f"{_now()} {own} joins the cluster at {offer.ray_address}; its log is {log}")
    try:
        started = start_process(*node_command(offer, home, own, cpus), log)
        began = seen = time.monotonic()
        joined = False
        while (process := started.process()) is not None:
            if _has_raylet(process):
                joined, seen = True, time.monotonic()
            elif joined and time.monotonic() - seen > LEAVING:
                return None
            time.sleep(0.5)
        with log.open(errors="replace") as file:
            file.seek(written)
            text = file.read()
    finally:
        end_all()
    return f"the Ray node ended after {time.monotonic() - began:.0f} s ({reason(text)})"


def _has_raylet(process: psutil.Process) -> bool:
    try:
        return any(child.name() == "raylet" for child in process.children())
    except psutil.NoSuchProcess:
        return False


def reason(log: str) -> str:
    """Return why `ray start` ended, from its log: the process that failed, else the last line."""
    log = re.sub(r"\x1b\[[\d;]*m", "", log)
    if found := re.search(r"(\w+) \[exit code=(-?\d+)\]", log):
        return f"{found[1]} ended with code {found[2]}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


@contextmanager
def _family() -> Iterator[Callable[[], None]]:
    """End on SIGTERM in order, and yield a function that ends all child processes.

    Ray's processes may outlive their parent; on Linux such orphans become children of this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    me = psutil.Process()
    others = set(me.children())
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    def end_all() -> None:
        # A second signal would leave processes behind.
        handlers = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            asked, deadline = set(others), time.monotonic() + GRACE
            while alive := set(me.children(recursive=True)) - others:
                late = time.monotonic() > deadline
                for process in alive if late else alive - asked:
                    signal_one(process, kill=late)
                asked |= alive
                psutil.wait_procs(alive, timeout=0.5)
        finally:
            for one, handler in handlers.items():
                signal.signal(one, handler)

    try:
        yield end_all
    finally:
        end_all()
        signal.signal(signal.SIGTERM, before)


def _now() -> str:
    return time.strftime("%H:%M:%S")
