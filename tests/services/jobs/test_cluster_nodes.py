"""Nodes from Ray's dashboard, and requests to Ray to drain a node."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from pipelines.errors import ConflictError, ServiceError, SpecError
from services.cli import app
from services.jobs import nodes
from services.jobs.documents import NodeUse
from services.settings import Settings
from services.tokens import Role
from tests.services.jobs.standin import JobService, OpenedJobs


def raylet(name: str, address: str, snapshot: str = "IDLE", **fields: Any) -> dict[str, Any]:
    known = {"nodeId": name, "nodeManagerAddress": address, "resourcesTotal": {"CPU": 4.0, "memory": 1.0}}
    usual = {"state": "ALIVE", "isHeadNode": False, "stateSnapshot": {"state": snapshot}}
    return {"raylet": known | usual | fields}


SUMMARY = [
    raylet("bb02", "10.0.0.2", "DRAINING"),
    raylet("aa01", "10.0.0.1", isHeadNode=True),
    raylet("cc03", "10.0.0.3", state="DEAD"),
    {"raylet": {}},  # of a node that has just come
]
USED = {"aa01": {"CPU": [1.0, 4.0]}, "bb02": {"CPU": [3.5, 4.0], "GPU": [1.0, 2.0]}}


def cluster(home: Path, summary: Any = SUMMARY, report: Any = None) -> nodes.Nodes:
    report = {"usageByNode": USED} if report is None else report

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer the-token"
        found = {
            "/nodes": {"summary": summary},
            "/api/cluster_status": {"clusterStatus": {"loadMetricsReport": report}},
        }
        return httpx.Response(200, json={"data": found[request.url.path]})

    (home / "ray.token").write_text("the-token")
    (home / "platform.json").write_text('{"ray_address": "10.0.0.1:6379", "ray_dashboard": "http://10.0.0.1:8265"}')
    return nodes.Nodes(Settings(home=home), httpx.MockTransport(answer))


@pytest.fixture(autouse=True)
def token_of_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_the_nodes_with_their_use(tmp_path: Path) -> None:
    head, other = cluster(tmp_path).all()
    assert (head.address, head.head, head.draining) == ("10.0.0.1", True, False)
    assert (other.address, other.head, other.draining) == ("10.0.0.2", False, True)
    assert (head.used_cpus, other.used_cpus, other.used_gpus, other.cpus, other.gpus) == (1, 3.5, 1, 4, 0)


def test_a_cluster_that_does_not_say_what_is_used(tmp_path: Path) -> None:
    assert {node.used_cpus for node in cluster(tmp_path, report={}).all()} == {None}


def test_what_is_not_understood_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="invalid list of nodes"):
        cluster(tmp_path, summary=[{"raylet": {"nodeId": "aa"}}]).all()
    away = nodes.Nodes(Settings(home=tmp_path, ray_dashboard="http://127.0.0.1:9"))
    with pytest.raises(ServiceError, match="the cluster is unreachable"):
        away.all()


def test_a_node_is_named_by_its_address_or_its_id(tmp_path: Path) -> None:
    found = cluster(tmp_path).all()
    assert nodes.pick(found, "10.0.0.2").id == nodes.pick(found, "bb").id == "bb02"
    for wrong in ("10.0.0.9", "", "zz"):
        with pytest.raises(SpecError, match="matches no node"):
            nodes.pick(found, wrong)
    with pytest.raises(SpecError, match="matches 2 nodes"):
        nodes.pick([found[1], found[1].model_copy(update={"id": "bb03"})], "bb")
    with pytest.raises(ConflictError, match=r"10\.0\.0\.1 is the head"):
        nodes.pick(found, "10.0.0.1")


def test_ray_is_asked_to_drain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], dict[str, str]]] = []
    done = subprocess.CompletedProcess([], 0, "", "")

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append((command, env))
        return done

    monkeypatch.setattr(nodes.subprocess, "run", run)
    assert cluster(tmp_path).drain("10.0.0.2", "root").draining
    ((command, environment),) = asked
    assert "drain-node --address 10.0.0.1:6379 --node-id bb02 --reason DRAIN_NODE_REASON_PREEMPTION" in " ".join(
        command
    )
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "ray.token")
    done.returncode, done.stderr = 1, "warning\nError: The drain request is not accepted: no\n"
    with pytest.raises(
        ConflictError, match=r"Ray refused to drain 10\.0\.0\.2: Error: The drain request is not accepted: no"
    ):
        cluster(tmp_path).drain("10.0.0.2", "root")


def test_a_node_is_taken_out_over_http(jobs: JobService, caplog: pytest.LogCaptureFixture) -> None:
    client = jobs.client(Role.ADMIN)
    with caplog.at_level("INFO"):
        assert client.put("/v1/nodes/10.0.0.2/drain").json()["draining"]
    assert '"what": "drain node"' in caplog.text
    assert client.put("/v1/nodes/10.0.0.1/drain").status_code == 409
    assert client.put("/v1/nodes/10.0.0.7/drain").json()["field"] == "node"
    assert [node["address"] for node in client.get("/v1/nodes").json()["nodes"]] == ["10.0.0.1", "10.0.0.2"]


class FakeJobs(OpenedJobs):
    """A job service with two nodes; one of them does not report its usage."""

    def nodes(self) -> list[NodeUse]:
        known: dict[str, Any] = {"cpus": 4, "gpus": 0}
        return [
            NodeUse(id="aa01", address="10.0.0.1", head=True, draining=False, used_cpus=1, used_gpus=0, **known),
            NodeUse(id="bb02", address="10.0.0.2", head=False, draining=True, used_cpus=None, used_gpus=None, **known),
        ]

    def drain_node(self, node: str) -> NodeUse:
        return self.nodes()[1]


def test_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.jobs.client.Jobs", FakeJobs)
    rows = [line.split("│") for line in CliRunner().invoke(app, ["nodes"]).output.splitlines() if "10.0.0" in line]
    assert [[cell.strip() for cell in row[2:6]] for row in rows] == [
        ["10.0.0.1", "1 of 4", "0 of 0", "head"],
        ["10.0.0.2", "4", "0", "draining"],
    ]
    assert "10.0.0.2 is draining" in CliRunner().invoke(app, ["drain", "10.0.0.2"]).output
    refused = CliRunner().invoke(app, ["drain", "--end", "10.0.0.2"])
    assert refused.exit_code == 2
    assert "cannot be undone" in refused.output
