"""Addresses and health of the services of a machine, local and remote."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipelines.errors import ServiceError
from services.jobs.client import Jobs
from services.platform import doctor, local
from services.platform.services import SERVICES, Machine, Service
from services.settings import Settings

BY_NAME = {service.name: service for service in SERVICES}


class Answers(BaseHTTPRequestHandler):
    """Responds with ``{}`` to every request, like a program unrelated to Monge."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def stranger() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(10)
    server.server_close()


DIES_AT_FIRST = """
import http.server, pathlib, sys
tries = pathlib.Path(sys.argv[1])
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) <= int(sys.argv[3]):
    sys.exit("its port is taken")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def up_with(monkeypatch: pytest.MonkeyPatch, home: Path, deaths: int) -> list[str]:
    """Start a platform of one service that exits ``deaths`` times before it serves; return the output."""

    def command(machine: Machine) -> tuple[list[str], dict[str, str]]:
        arguments = [str(home / "tries"), machine.port("endpoint_url"), str(deaths)]
        return [sys.executable, "-c", DIES_AT_FIRST, *arguments], {}

    service = Service("flaky", {"endpoint_url": 0}, "endpoint_url", "/", 30, command)
    monkeypatch.setattr(local, "SERVICES", (service,))
    said: list[str] = []
    local.up(home, said.append)
    return said


def test_a_service_that_ends_at_once_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = up_with(monkeypatch, tmp_path, deaths=2)
    try:
        assert said.count("starting flaky") == 3
        (health,) = local.status(Settings(home=tmp_path))
        assert health.healthy
        assert health.pid is not None
        assert up_with(monkeypatch, tmp_path, deaths=2) == []
    finally:
        assert local.down(tmp_path, said.append)
    assert not local.down(tmp_path, said.append)


def test_a_service_that_always_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceError, match=r"flaky did not start; the end of .*\n(its port is taken\n?){3}"):
        up_with(monkeypatch, tmp_path, deaths=9)
    assert len((tmp_path / "tries").read_text()) == local.STARTS


def test_what_had_joined_a_service_that_died_is_started_again_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(setting: str) -> Callable[[Machine], tuple[list[str], dict[str, str]]]:
        server = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]
        return lambda machine: ([*server, machine.port(setting)], {})

    named = {"head": "ray_dashboard", "joined": "transport_url", "other": "endpoint_url"}
    services = [
        Service(name, {url: 0}, url, "/", 30, command(url), after="head" if name == "joined" else None)
        for name, url in named.items()
    ]
    monkeypatch.setattr(local, "SERVICES", tuple(services))
    said: list[str] = []
    before = local.up(tmp_path, said.append).processes
    try:
        head = before["head"].process()
        assert head is not None
        head.kill()
        head.wait(30)
        after = local.up(tmp_path, said.append).processes
        assert {name for name in named if after[name] != before[name]} == {"head", "joined"}
        assert before["joined"].process() is None
        assert said.count("stopping joined, which uses an earlier head") == 1
        assert local.up(tmp_path, said.append).processes == after
    finally:
        local.down(tmp_path, said.append)


def ports(home: Path, name: str, said: list[str]) -> dict[str, int]:
    chosen = local._addresses(home, BY_NAME[name], said.append)
    return {setting: int(url.rpartition(":")[2]) for setting, url in chosen.items()}


def test_a_service_listens_where_it_did_before(tmp_path: Path) -> None:
    said: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        (tmp_path / "ports.json").write_text(json.dumps({"mlflow_uri": taken.getsockname()[1]}))
        free = taken.getsockname()[1]
    assert ports(tmp_path, "mlflow", said) == {"mlflow_uri": free}
    assert ports(tmp_path, "ray", said).keys() == {"ray_address", "ray_dashboard"}
    assert json.loads((tmp_path / "ports.json").read_text()).keys() == {"mlflow_uri", "ray_address", "ray_dashboard"}
    assert not said


def test_a_port_that_somebody_took_is_told(tmp_path: Path, stranger: str) -> None:
    port = int(stranger.rpartition(":")[2])
    (tmp_path / "ports.json").write_text(json.dumps({"mlflow_uri": port}))
    said: list[str] = []
    found = ports(tmp_path, "mlflow", said)["mlflow_uri"]
    assert found != port
    assert said == [f"port {port} of mlflow is taken: running jobs do not know {found}"]
    assert json.loads((tmp_path / "ports.json").read_text()) == {"mlflow_uri": found}


@pytest.mark.parametrize("damaged", ["", "[]", '{"mlflow_uri": null}'])
def test_ports_that_cannot_be_read_are_chosen_anew(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "ports.json").write_text(damaged)
    assert ports(tmp_path, "mlflow", [])["mlflow_uri"] > 0


def test_services_elsewhere_are_asked_there(tmp_path: Path, stranger: str) -> None:
    nowhere = "http://127.0.0.1:9"
    settings = Settings(home=tmp_path, mlflow_uri=stranger, transport_url=f"{stranger}/", endpoint_url=nowhere)
    found = {health.name: health for health in local.status(settings)}
    assert (found["mlflow"].healthy, found["transport"].healthy, found["endpoint"].healthy) == (True, True, False)
    assert found["mlflow"].named_by == "MONGE_MLFLOW_URI"
    assert found["ray"] == local.Health("ray", None, False, None)

    told = {finding.what: finding for finding in doctor.check_machine(settings)}
    assert told["mlflow"].found == f"answers at {stranger}"
    assert told["endpoint"].hint == "start the service there, or change MONGE_ENDPOINT_URL"
    assert not told["endpoint"].optional
    assert told["ray"].hint == "monge up"
    assert told["ray"].optional


def test_a_stranger_on_the_port_of_the_jobs_is_no_job_service(tmp_path: Path, stranger: str) -> None:
    with pytest.raises(ServiceError, match=f"{stranger} is not a job service"):
        Jobs(Settings(home=tmp_path, jobs_url=stranger)).find()
