"""Checks before a machine becomes a node, the start of the node, and its restart after it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import uvicorn
from pydantic import SecretStr

from pipelines.errors import ConflictError, ForbiddenError, ServiceError, SpecError, StorageError, UnauthenticatedError
from services.http import bound
from services.jobs.api import build_app
from services.jobs.documents import Joining
from services.jobs.joining import make_home_id, offer, read_home_id, versions
from services.platform import nodes
from services.settings import Settings
from services.tokens import Role
from tests.services.jobs.standin import RAY_TOKEN, JobService

ROOT = Path(__file__).parents[3]
pytest_plugins = ("tests.services.jobs.conftest",)


@pytest.fixture
def head() -> Iterator[str]:
    """Listen on a port like the head of a cluster."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def offered(folder: Path, ray_address: str = "127.0.0.1:9", **fields: object) -> Joining:
    known = {
        "ray_address": ray_address,
        "ray_token": RAY_TOKEN,
        "mlflow_uri": "http://127.0.0.1:9",
        "transport_url": None,
        "home": str(folder),
        "home_id": make_home_id(folder),
        "versions": versions(),
    }
    return Joining.model_validate(known | fields)


def test_a_machine_that_fits_gives_its_own_address(tmp_path: Path, head: str) -> None:
    told = offered(tmp_path, head)
    assert nodes.check(told, Settings()) == "127.0.0.1"
    assert nodes.check(told, Settings(home=tmp_path)) == "127.0.0.1"
    assert nodes.check(told, Settings(), "127.0.0.5") == "127.0.0.5"
    with pytest.raises(SpecError, match="is not an address of this machine"):
        nodes.check(told, Settings(), "192.0.2.1")


@pytest.mark.parametrize("name", ["monge", "ray", "Python"])
def test_another_version_is_refused(tmp_path: Path, head: str, name: str) -> None:
    told = offered(tmp_path, head, versions=versions() | {name: "0.0.1"})
    with pytest.raises(ConflictError, match=f"{name} .* here, 0.0.1 on the head"):
        nodes.check(told, Settings())


def test_a_home_that_is_not_the_heads_is_refused(tmp_path: Path, head: str) -> None:
    with pytest.raises(ConflictError, match=r"home\.id is [0-9a-f]{16} here, 0123 there"):
        nodes.check(offered(tmp_path, head, home_id="0123"), Settings())
    with pytest.raises(ServiceError, match=r"home\.id cannot be read here"):
        nodes.check(offered(tmp_path, head, home=str(tmp_path / "elsewhere")), Settings())
    with pytest.raises(ConflictError, match="jobs refer to files by path"):
        nodes.check(offered(tmp_path, head), Settings(home=tmp_path / "other"))


def test_a_node_has_a_home_of_its_own_where_storage_lies_in_s3(
    tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    told = offered(tmp_path, head, home="/nowhere", home_id="0123", storage="s3://bucket/ours")
    own = Settings(home=tmp_path / "own")
    with pytest.raises(StorageError, match="s3://bucket/ours: no keys for S3 found"):
        nodes.check(told, own)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-key")
    assert nodes.check(told, own) == "127.0.0.1"
    with pytest.raises(ConflictError, match="MONGE_STORAGE: s3://other here, s3://bucket/ours on the head"):
        nodes.check(told, Settings(storage="s3://other"))
    home = nodes.home_of(told, own)
    assert home == tmp_path / "own"
    _, environment = nodes.node_command(told, home, "127.0.0.5", 3)
    assert (environment["MONGE_HOME"], environment["MONGE_STORAGE"]) == (str(home), "s3://bucket/ours")
    assert "hidden-key" not in str(environment)


def test_a_head_that_is_not_reached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"the Ray head at 127\.0\.0\.1:9 is unreachable"):
        nodes.check(offered(tmp_path), Settings())
    with pytest.raises(ServiceError, match="the job service at") as caught:
        nodes.ask(Settings(jobs_url="http://127.0.0.1:9"))
    assert "monge up" not in str(caught.value.hint)


def test_services_that_a_node_does_not_reach_are_told(tmp_path: Path) -> None:
    (warning,) = nodes.unreachable(offered(tmp_path))
    assert "http://127.0.0.1:9 is unreachable from here" in warning


def test_a_home_is_known_again(tmp_path: Path) -> None:
    assert read_home_id(tmp_path) == ""
    assert make_home_id(tmp_path) == make_home_id(tmp_path) == read_home_id(tmp_path)
    assert make_home_id(tmp_path / "other") != read_home_id(tmp_path)


def test_the_command_line_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    command, environment = nodes.node_command(offered(tmp_path, "10.0.0.1:6379"), tmp_path, "127.0.0.5", 3)
    line = " ".join(command)
    assert "start --address 10.0.0.1:6379 --block --node-ip-address 127.0.0.5" in line
    assert line.endswith("--num-cpus 3")
    assert RAY_TOKEN not in line
    assert environment["RAY_AUTH_TOKEN"] == RAY_TOKEN
    assert environment["MONGE_HOME"] == str(tmp_path)
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"
    assert "--num-cpus" not in nodes.node_command(offered(tmp_path), tmp_path, "127.0.0.5", None)[0]


def test_pauses_grow_and_begin_anew() -> None:
    assert nodes.next_pause(1, 5) == 2
    assert nodes.next_pause(29, 5) == nodes.LONGEST_PAUSE
    assert nodes.next_pause(30, nodes.STEADY) == nodes.FIRST_PAUSE


def test_why_a_node_ended() -> None:
    written = "ERR scripts.py:1307 -- \x1b[31mSome Ray subprocesses exited unexpectedly:\x1b[39m\n"
    written += "ERR scripts.py:87 -- \x1b[31m\x1b[1mraylet\x1b[22m\x1b[0m\x1b[2m [exit code=-9]\x1b[22m\x1b[0m\nbye\n"
    assert nodes.reason(written) == "raylet ended with code -9"
    assert nodes.reason("one\nRuntimeError: two\n\n") == "RuntimeError: two"
    assert nodes.reason("") == "no output"


# The head's side


def test_what_the_head_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "ray.token"))
    (tmp_path / "ray.token").write_text(RAY_TOKEN)
    settings = Settings(home=tmp_path)
    assert settings.platform == {}  # of a process that started before the rest of the platform
    (tmp_path / "platform.json").write_text(
        '{"ray_address": "10.0.0.1:6379", "mlflow_uri": "http://m", "transport_url": "http://t"}'
    )
    told = offer(settings, loopback=False)
    assert (told.ray_address, told.ray_token, told.transport_url) == ("10.0.0.1:6379", RAY_TOKEN, "http://t")
    assert told.home_id == read_home_id(tmp_path)
    assert RAY_TOKEN not in repr(told)
    with pytest.raises(ConflictError, match=r"listens on 127\.0\.0\.1"):
        offer(settings, loopback=True)


def test_the_token_is_kept_nowhere(jobs: JobService, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        answer = jobs.client().get("/v1/cluster/join")
    assert answer.json()["ray_token"] == RAY_TOKEN
    assert answer.headers["cache-control"] == "no-store"
    assert "ask how to join" in caplog.text
    assert RAY_TOKEN not in caplog.text


@pytest.fixture
def service(jobs: JobService) -> Iterator[str]:
    """Run a job service with a cluster; yield its URL."""
    listener = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(jobs.service()), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def test_a_wrong_token_is_refused(jobs: JobService, service: str) -> None:
    def asking(secret: str) -> Joining:
        return nodes.ask(Settings(jobs_url=service, token=SecretStr(secret)))

    assert asking(jobs.token("root", Role.ADMIN).secret).ray_token == RAY_TOKEN
    with pytest.raises(UnauthenticatedError, match="an invalid token"):
        asking("guessed")
    with pytest.raises(ForbiddenError, match="this request requires 'admin'"):
        asking(jobs.token("someone", Role.SUBMIT).secret)


# The node's life, with a program in the place of Ray

STAND_IN = """
import sys
from pathlib import Path
from services.jobs.documents import Joining
from services.platform import nodes

offer, script, folder = Joining.model_validate_json(sys.argv[1]), sys.argv[2], sys.argv[3]
nodes.ask = lambda settings: offer
nodes.check = lambda *_: "127.0.0.5"
nodes.node_command = lambda *_: ([sys.executable, "-c", script, folder], {})
nodes.LEAVING, nodes.FIRST_PAUSE = 1.0, 0.1
nodes.join(None, lambda line: print(line, flush=True))
print("over", flush=True)
"""

ENDS_TWICE = """
import pathlib, subprocess, sys, time
tries = pathlib.Path(sys.argv[1], "tries")
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
subprocess.Popen(["sleep", "600"], start_new_session=True)
if len(tries.read_text()) <= 2:
    print("  raylet [exit code=-9]", flush=True)
    sys.exit(1)
time.sleep(600)
"""

DRAINED = """
import os, shutil, subprocess, sys, time
raylet = os.path.join(sys.argv[1], "raylet")
shutil.copy(shutil.which("sleep"), raylet)
subprocess.run([raylet, "2"])
time.sleep(600)
"""


def living(home: Path, script: str) -> subprocess.Popen[str]:
    told = offered(home).model_dump_json()
    return subprocess.Popen(
        [sys.executable, "-c", STAND_IN, told, script, str(home)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_node_that_ends_joins_again_until_it_is_told_to_end(tmp_path: Path) -> None:
    process = living(tmp_path, ENDS_TWICE)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(5)]
    assert sum("joins the cluster" in line for line in lines) == 2, lines
    assert [line.rpartition(";")[2].strip() for line in lines if "ended" in line] == [
        "joining again in 0.1 s",
        "joining again in 0.2 s",
    ]
    assert "raylet ended with code -9" in lines[2]
    assert "joins the cluster" in process.stdout.readline()
    family = psutil.Process(process.pid)
    assert nodes_of(family), "the third lives"
    children = family.children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not [child for child in children if child.is_running()]
    process.stdout.close()


def nodes_of(process: psutil.Process) -> list[psutil.Process]:
    from services.platform.processes import wait_until

    wait_until(lambda: len(process.children(recursive=True)) >= 2, timeout=20)
    return process.children(recursive=True)


def test_a_node_that_was_drained_does_not_join_again(tmp_path: Path) -> None:
    process = living(tmp_path, DRAINED)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "the node has left the cluster" in output
    assert output.rstrip().endswith("over")
    assert "joining again" not in output
