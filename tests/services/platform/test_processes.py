"""Processes of the platform are recognised again, and stopped with their children."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.errors import ServiceError
from services.locks import alone
from services.platform import processes

SPAWNS_A_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
IGNORES_TERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


def test_ends_a_process_with_its_children(tmp_path: Path) -> None:
    started = processes.start_process([sys.executable, "-c", SPAWNS_A_CHILD], {}, tmp_path / "log")
    process = started.process()
    assert process is not None
    assert processes.wait_until(lambda: bool(process.children()), timeout=20)
    (child,) = process.children()

    assert processes.end(started)

    assert started.process() is None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_kills_what_does_not_heed_the_request(tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = processes.start_process([sys.executable, "-c", IGNORES_TERM], {}, log)
    assert processes.wait_until(lambda: "ready" in log.read_text(), timeout=20)

    assert processes.end(started, grace=0.5)

    assert started.process() is None


def test_leaves_alone_a_stranger_that_has_the_pid_now(tmp_path: Path) -> None:
    started = processes.start_process([sys.executable, "-c", "import time; time.sleep(600)"], {}, tmp_path / "log")
    earlier = dataclasses.replace(started, born=started.born - 3600)

    assert not processes.end(earlier)

    assert started.process() is not None
    processes.end(started)


def test_environment_and_output_of_a_started_process(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log"
    processes.start_process(
        [sys.executable, "-c", "import os; print(os.environ['GREETING'])"], {"GREETING": "salut"}, log
    )
    assert processes.wait_until(lambda: processes.tail(log) == "salut", timeout=20)


def test_a_missing_program_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="no-such-program cannot be started"):
        processes.start_process(["no-such-program"], {}, tmp_path / "log")


def test_free_port_prefers_but_does_not_insist() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        assert processes.free_port(busy) != busy
    assert processes.free_port(busy) == busy
    assert processes.free_port() in processes.DRAWN


def test_wait_until_gives_up() -> None:
    assert not processes.wait_until(lambda: False, timeout=0.1, interval=0.01)


def test_a_lock_is_held_by_one_and_goes_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "lock"
    with alone(lock, "taken"), pytest.raises(ServiceError, match="taken"), alone(lock, "taken"):
        pass
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
         "print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ServiceError, match="taken"), alone(lock, "taken"):
        pass
    holder.kill()
    holder.wait(10)
    holder.stdout.close()
    with alone(lock, "taken"):
        pass
