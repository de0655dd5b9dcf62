"""The address on which the services of a machine listen: chosen once, stored, and validated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipelines.errors import ConflictError, SpecError
from services.platform import local
from services.platform.services import SERVICES, Machine, Service, address, host_of, require_own
from services.settings import Settings, load_settings

ELSEWHERE = "127.0.0.5"
"""Represents another address of this machine: all of 127.0.0.0/8 is local."""


def one_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the platform to one server that listens on the given address."""

    def command(machine: Machine) -> tuple[list[str], dict[str, str]]:
        server = [sys.executable, "-m", "http.server", "--bind", machine.host]
        return [*server, machine.port("endpoint_url")], {}

    service = Service("server", {"endpoint_url": 0}, "endpoint_url", "/", 30, command)
    monkeypatch.setattr(local, "SERVICES", (service,))


def test_a_host_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_service(monkeypatch)
    said: list[str] = []
    assert local.kept_host(tmp_path) == "127.0.0.1"
    try:
        first = local.up(tmp_path, said.append, host=ELSEWHERE).addresses["endpoint_url"]
        assert host_of(first) == ELSEWHERE
        (health,) = local.status(Settings(home=tmp_path))
        assert (health.url, health.healthy) == (first, True)
        assert local.down(tmp_path, said.append)
        assert local.up(tmp_path, said.append).addresses["endpoint_url"] == first
        with pytest.raises(ConflictError, match=f"127.0.0.1 requested, but server listens on {ELSEWHERE}"):
            local.up(tmp_path, said.append, host="127.0.0.1")
        assert local.kept_host(tmp_path) == ELSEWHERE
        local.down(tmp_path, said.append)
        back = local.up(tmp_path, said.append, host="127.0.0.1").addresses["endpoint_url"]
        assert host_of(back) == local.kept_host(tmp_path) == "127.0.0.1"
    finally:
        local.down(tmp_path, said.append)


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("0.0.0.0", "'0.0.0.0' is not one IPv4 address"),
        ("localhost", "'localhost' is not one IPv4 address"),
        ("::1", "'::1' is not one IPv4 address"),
        ("192.0.2.1", "192.0.2.1 is not an address of this machine"),  # of an example network, RFC 5737
    ],
)
def test_a_host_that_cannot_be_is_refused(tmp_path: Path, host: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        local.up(tmp_path, lambda _: None, host=host)
    assert local.kept_host(tmp_path) == "127.0.0.1"
    require_own("127.0.0.1")


def commands(home: Path, host: str) -> dict[str, str]:
    addresses = {setting: address(setting, port, host) for s in SERVICES for setting, port in s.ports.items()}
    return {s.name: " ".join(s.command(Machine(home, addresses, host=host))[0]) for s in SERVICES}


def test_every_command_line_names_the_host(tmp_path: Path) -> None:
    for name, line in commands(tmp_path, ELSEWHERE).items():
        assert f" --host {ELSEWHERE}" in line or f" --node-ip-address {ELSEWHERE}" in line, name
        assert "127.0.0.1" not in line or name == "mlflow", name
    found = commands(tmp_path, ELSEWHERE)
    assert f"--dashboard-host {ELSEWHERE}" in found["ray"]
    assert f"--ray {ELSEWHERE}:6379" in found["transport"]
    assert f"--allowed-hosts localhost,localhost:*,127.0.0.1,127.0.0.1:*,{ELSEWHERE},{ELSEWHERE}:*" in found["mlflow"]
    assert f"--cors-allowed-origins http://{ELSEWHERE}:5000" in found["mlflow"]


def test_on_loopback_nothing_of_it_is_said(tmp_path: Path) -> None:
    for line in commands(tmp_path, "127.0.0.1").values():
        assert "--allowed-hosts" not in line
        assert "127.0.0.1" in line


def test_who_asks_about_tokens_starts_after_who_knows_them() -> None:
    order = [service.name for service in SERVICES]
    assert order.index("jobs") < min(order.index("transport"), order.index("endpoint"))


def test_the_advice_is_a_warning_and_one_command(tmp_path: Path) -> None:
    addresses = {s.url: address(s.url, 1, ELSEWHERE) for s in SERVICES}
    lines = local.advice(tmp_path, local.Platform(addresses=addresses))
    assert "MLflow at http://127.0.0.5:1 requires no token" in lines[0]
    assert lines[-1] == f"  MONGE_TOKEN=$(cat {tmp_path / 'token'}) monge node join http://127.0.0.5:1"


def test_a_storage_is_remembered_and_no_other_one_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SERVICES", ())
    monkeypatch.setenv("MONGE_HOME", str(tmp_path))
    local.up(tmp_path, print)
    assert load_settings().storage is None
    local.up(tmp_path, print, storage="s3://bucket/a")
    assert load_settings().storage == "s3://bucket/a"
    local.up(tmp_path, print)
    local.up(tmp_path, print, storage=load_settings().storage)
    with pytest.raises(ConflictError, match=r"s3://other, but the checkpoints in .* in s3://bucket/a"):
        local.up(tmp_path, print, storage="s3://other")
    monkeypatch.setenv("MONGE_STORAGE", "s3://other")
    assert load_settings().storage == "s3://other"
