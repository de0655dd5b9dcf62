"""Processes of the local platform: started detached, identified by pid and start time, ended with their children."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.errors import ServiceError
from services.settings import LOOPBACK

DRAWN = range(20_000, 32_000)
TRIES = 100
_BIRTH_TOLERANCE = 2.0
_GRACE = 5.0


@dataclass(frozen=True)
class Started:
    """A process started by the platform.

    Attributes:
        pid: pid of the process.
        born: start time of the process; the system may reuse the pid.
    """

    pid: int
    born: float

    def process(self) -> psutil.Process | None:
        """Return the process; None if it has ended."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.born) > _BIRTH_TOLERANCE or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        return process


def start_process(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Started:
    """Start a process in a new session, so that it outlives this one; its output goes to ``log``.

    Raises:
        ServiceError: the program cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise ServiceError(f"{command[0]} cannot be started: {error}") from error
    return Started(process.pid, psutil.Process(process.pid).create_time())


def end(started: Started, grace: float = _GRACE) -> bool:
    """End a process and its children: SIGTERM first, SIGKILL after ``grace`` seconds.

    Returns:
        Whether the process was running.
    """
    process = started.process()
    if process is None:
        return False
    family = [process, *process.children(recursive=True)]
    signal_one(process, kill=False)
    _, alive = psutil.wait_procs(family, timeout=grace)
    for survivor in alive:
        signal_one(survivor, kill=True)
    psutil.wait_procs(alive, timeout=grace)
    return True


def signal_one(process: psutil.Process, kill: bool) -> None:
    """Send SIGKILL or SIGTERM to a process, which may have ended."""
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return


def free_port(preferred: int | None = None, host: str = LOOPBACK) -> int:
    """Return a free port on an address of this machine: the preferred one if it is free.

    Other ports are below the range of outgoing connections, since such a connection could take the port before the
    caller listens on it.
    """
    drawn = random.sample(DRAWN, TRIES)
    for candidate in [preferred, *drawn] if preferred else drawn:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServiceError("no port is free on this machine")


def tail(log: Path, lines: int = 15) -> str:
    """Return the end of a log, for an error message."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def wait_until(condition: Callable[[], bool], timeout: float, interval: float = 0.2) -> bool:
    """Poll ``condition()`` until it is true; return False if it is not within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(interval)
    return False
