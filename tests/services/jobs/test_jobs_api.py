"""The job service over HTTP: permissions of tokens, errors, pagination, logs and streams."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from services.gate import Access
from services.jobs.controller import Snapshot
from services.jobs.policy import Cluster
from services.jobs.states import State
from services.tokens import Role, Token
from tests.services.jobs.standin import JobService, spec_document

SUBMISSION = {"spec": spec_document()}

ROUTES: list[tuple[str, str, Any, Role | None]] = [
    ("POST", "/v1/jobs", SUBMISSION, Role.SUBMIT),
    ("POST", "/v1/plans", {"spec": spec_document(data={"source": "nowhere"})}, Role.SUBMIT),
    ("GET", "/v1/jobs", None, Role.READ),
    ("GET", "/v1/jobs/{job}", None, Role.READ),
    ("DELETE", "/v1/jobs/{job}", None, Role.SUBMIT),
    ("GET", "/v1/jobs/{job}/logs", None, Role.READ),
    ("GET", "/v1/jobs/{job}/logs/stream", None, Role.READ),
    ("GET", "/v1/jobs/{job}/events", None, Role.READ),
    ("GET", "/v1/jobs/{job}/events/stream", None, Role.READ),
    ("GET", "/v1/cluster", None, Role.READ),
    ("GET", "/v1/cluster/join", None, Role.ADMIN),
    ("GET", "/v1/nodes", None, Role.READ),
    ("PUT", "/v1/nodes/10.0.0.2/drain", None, Role.ADMIN),
    ("PUT", "/v1/drain", None, Role.ADMIN),
    ("DELETE", "/v1/drain", None, Role.ADMIN),
    ("POST", "/v1/tokens", {"name": "new", "role": "read"}, Role.ADMIN),
    ("GET", "/v1/tokens", None, Role.ADMIN),
    ("GET", "/v1/tokens/self", None, None),
    ("DELETE", "/v1/tokens/new", None, Role.ADMIN),
    ("POST", "/v1/jobs/{job}/retry", None, Role.SUBMIT),
]
ALLOWED = {
    None: set(),
    Role.CALL: set(),
    Role.READ: {Role.READ},
    Role.SUBMIT: {Role.READ, Role.SUBMIT},
    Role.ADMIN: {Role.READ, Role.SUBMIT, Role.ADMIN},
}


def cancelled(jobs: JobService, owner: str = "a-submit") -> str:
    """Create a cancelled job, so that streams of it end."""
    job = jobs.submit(owner)
    jobs.store.cancel(job, owner)
    jobs.step()
    return job


@pytest.mark.parametrize("role", ALLOWED)
def test_a_token_of_each_role_against_each_route(jobs: JobService, role: Role | None) -> None:
    client = jobs.client(role)
    job = cancelled(jobs)
    for method, path, body, needed in ROUTES:
        answer = client.request(method, path.format(job=job), json=body)
        allowed = role is not None if needed is None else needed in ALLOWED[role]
        expected = answer.status_code not in (401, 403) if allowed else None
        if expected is None:
            assert answer.status_code == (401 if role is None else 403), path
            assert answer.json()["error"] == ("UnauthenticatedError" if role is None else "ForbiddenError")
        else:
            assert expected, (path, answer.text)
    documented = {(m.upper(), p) for p, found in client.get("/openapi.json").json()["paths"].items() for m in found}
    open_to_all = {("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics")}
    paths = {(m, p.replace("/new", "/{name}").replace("10.0.0.2", "{node}")) for m, p, _, _ in ROUTES}
    assert documented == paths | open_to_all, "a route without a row in this table"


def test_a_revoked_token_is_worthless(jobs: JobService) -> None:
    client, admin = jobs.client(Role.READ), jobs.client(Role.ADMIN)
    assert client.get("/v1/jobs").status_code == 200
    assert admin.delete("/v1/tokens/a-read").json()["revoked"]
    answer = client.get("/v1/jobs")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "secret" not in admin.get("/v1/tokens").text


def test_a_token_is_told_what_it_is(jobs: JobService) -> None:
    for role in Role:
        told = jobs.client(role).get("/v1/tokens/self").json()
        assert (told["name"], told["role"], told["revoked"]) == (f"a-{role}", role, None)
        assert "secret" not in told


def test_a_job_is_its_owners(jobs: JobService) -> None:
    job = jobs.submit("somebody")
    answer = jobs.client(Role.SUBMIT).delete(f"/v1/jobs/{job}")
    assert answer.status_code == 403
    assert "belongs to somebody" in answer.json()["message"]
    assert jobs.client(Role.ADMIN).delete(f"/v1/jobs/{job}").status_code == 200


def test_a_token_that_asks_too_often_is_told_when_to_ask_again() -> None:
    token = Token(
        name="hasty", role=Role.READ, created="2026-01-01T00:00:00Z", revoked=None, requests_per_second=1e-3, max_jobs=1
    )  # type: ignore[arg-type]
    access = Access()
    request: Any = SimpleNamespace(headers={"authorization": "Bearer x"}, state=SimpleNamespace())
    for _ in range(2):
        access.admit(request, token, Role.READ)
    with pytest.raises(Exception, match=r"exceeds 0\.001 requests") as refused:
        access.admit(request, token, Role.READ)
    assert 0 < refused.value.retry_after <= 1000  # type: ignore[attr-defined]


def test_a_token_has_room_for_so_many_jobs(jobs: JobService) -> None:
    client = jobs.client(Role.ADMIN)
    made = client.post("/v1/tokens", json={"name": "small", "role": "submit", "max_jobs": 1}).json()
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert client.post("/v1/jobs", json=SUBMISSION, headers=headers).status_code == 201
    answer = client.post("/v1/jobs", json=SUBMISSION, headers=headers)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "60"


# Submitting


def test_the_same_key_gives_the_same_job(jobs: JobService) -> None:
    client = jobs.client(Role.SUBMIT)
    first = client.post("/v1/jobs", json=SUBMISSION, headers={"Idempotency-Key": "k"})
    again = client.post("/v1/jobs", json=SUBMISSION, headers={"Idempotency-Key": "k"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = client.post("/v1/jobs", json=SUBMISSION | {"priority": 1}, headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["error"]) == (409, "ConflictError")
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1


def test_the_same_key_gives_the_same_job_where_an_alias_has_moved(jobs: JobService) -> None:
    client = jobs.client(Role.SUBMIT)
    objective = {"kind": "transport", "features": [{"network": "codes"}]}
    submission = {"spec": spec_document(model={"kind": "conv-generator"}, objective=objective)}
    unknown = client.post("/v1/jobs", json=submission)
    assert (unknown.status_code, unknown.json()["error"]) == (404, "ModelNotFoundError")
    answers = []
    for version in ("codes/1", "codes/2"):
        jobs.models["codes"] = version
        answers.append(client.post("/v1/jobs", json=submission, headers={"Idempotency-Key": "k"}))
    assert [answer.status_code for answer in answers] == [201, 200]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    spec = client.get(f"/v1/jobs/{answers[0].json()['id']}").json()["spec"]
    assert spec["objective"]["features"][0]["network"] == "codes/1"


def test_a_spec_in_yaml_with_the_rest_in_the_query(jobs: JobService) -> None:
    answer = jobs.client(Role.SUBMIT).post(
        "/v1/jobs?priority=3&timeout=60&label=team=vision",
        content=yaml.safe_dump(spec_document()),
        headers={"Content-Type": "application/yaml"},
    )
    assert answer.status_code == 201
    job = answer.json()
    assert (job["priority"], job["timeout"], job["labels"]) == (3, 60, {"team": "vision"})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"spec": spec_document(nmae="x")}, "nmae: no such field"),
        ({"spec": spec_document(), "prioritty": 1}, "prioritty: Extra inputs"),
        ({"spec": spec_document(), "priority": 1000}, "priority: Input should be less than or equal to 100"),
        (
            {"spec": spec_document(data={"source": "digitz"})},
            "'digitz' is neither an absolute path nor a name in the catalogue",
        ),
        ({"spec": spec_document(data={"source": "/no/such/folder"})}, "/no/such/folder does not exist on the cluster"),
        ({"spec": spec_document(data={"source": "s3://key:secret@b/p"})}, "must not contain keys"),
        ({"spec": spec_document(workers={"count": 3})}, "workers.count: 3 CPUs requested, the cluster has 2"),
        ({"spec": spec_document(workers={"count": 1, "device": "gpu"})}, "1 GPUs requested, the cluster has 0"),
        ({"spec": spec_document(), "overrides": ["train.imagse=1"]}, "train.imagse: no such field"),
        ({"spec": "name: ["}, "spec: not YAML"),
        ({"spec": [1]}, "spec"),
        ([1, 2], "body: "),
        (b"\xff", "body: neither JSON nor YAML"),
        (b"[" * 100_000, "body: neither JSON nor YAML"),
    ],
)
def test_what_is_wrong_is_said_at_submission(jobs: JobService, body: Any, said: str) -> None:
    jobs.step()  # the cluster is known
    client = jobs.client(Role.SUBMIT)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/v1/jobs", content=content)
    document = answer.json()
    assert answer.status_code == 422, document
    assert said in document["message"]
    assert document["hint"] or "no such field" in document["message"] or "not YAML" in document["message"]
    assert document["request_id"] == answer.headers["x-request-id"]
    assert "secret" not in answer.text
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_a_classifier_that_is_not_registered_cannot_judge(jobs: JobService) -> None:
    spec = spec_document(
        model={"kind": "conv-generator"},
        objective={"kind": "transport"},
        train={"images": 640, "batch": 64},
        evaluation={"reference": "nobody"},
    )
    answer = jobs.client(Role.SUBMIT).post("/v1/jobs", json={"spec": spec})
    assert (answer.status_code, answer.json()["error"]) == (404, "ModelNotFoundError")


def test_nodes_that_will_come_can_be_waited_for(jobs: JobService) -> None:
    jobs.step()
    big = {"spec": spec_document(workers={"count": 8}, train={"images": 640, "batch": 64}), "wait": True}
    job = jobs.client(Role.SUBMIT).post("/v1/jobs", json=big).json()["id"]
    small = jobs.submit(workers={"count": 1})
    jobs.step()
    assert jobs.store.job(job).reason == "8 CPUs requested, the cluster has 2: waiting for nodes"
    assert jobs.store.job(small).state is State.STARTING


def test_a_plan_names_data_network_and_workers(jobs: JobService, tmp_path: Path) -> None:
    jobs.step()
    client = jobs.client(Role.SUBMIT)
    lines = client.post("/v1/plans", json=SUBMISSION).json()["lines"]
    assert lines == ["data: digits from the catalogue", "workers: 2 workers on CPUs"]
    (tmp_path / "one" / "cats").mkdir(parents=True)
    answer = client.post("/v1/plans", json={"spec": spec_document(data={"source": str(tmp_path / "one")})})
    assert (answer.status_code, answer.json()["error"]) == (422, "SourceError")


# Reading


def test_pages_and_filters(jobs: JobService) -> None:
    client = jobs.client(Role.READ)
    made = [
        jobs.submit("ada" if index % 2 else "bob", name=f"n{index % 3}", labels={"i": str(index)}) for index in range(7)
    ]
    seen, before = [], {}
    while True:
        page = client.get("/v1/jobs", params={"limit": 3, **before}).json()
        seen += [job["id"] for job in page["jobs"]]
        if page["next"] is None:
            break
        before = {"before": page["next"]}
    assert seen == made[::-1]

    def found(**params: Any) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", params=params).json()["jobs"]][::-1]

    assert found(owner="ada") == made[1::2]
    assert found(name="n1") == made[1::3]
    assert found(label="i=3") == [made[3]]
    assert found(state="queued", owner="bob") == made[::2]
    assert found(state=["failed", "running"]) == []
    assert client.get("/v1/jobs?state=lost").status_code == 422
    assert client.get("/v1/jobs?limit=0").json()["field"] == "limit"
    missing = client.get("/v1/jobs/nobody").json()
    assert missing["message"] == f"no job 'nobody'; the latest are: {', '.join(made[:1:-1])}"


def test_a_log_is_read_from_an_offset_and_followed_to_its_end(jobs: JobService) -> None:
    job = jobs.submit()
    jobs.step()
    for attempt, text in ((1, "one\ntwo\nthr"), (2, "é\n" + "x" * 2_000_000 + "\nfour")):
        jobs.logs.append(job, attempt, text.encode())
    client = jobs.client(Role.READ)
    lines, offset = [], 0
    while True:
        page = client.get(f"/v1/jobs/{job}/logs", params={"offset": offset}).json()
        assert not page["ended"]
        if not page["lines"]:
            break
        lines, offset = lines + page["lines"], page["next"]
    assert "".join(lines) == "onetwothr[monge] attempt 2é" + "x" * 2_000_000
    assert client.get(f"/v1/jobs/{job}/logs", params={"offset": 4}).json()["lines"] == ["two"]
    assert client.get(f"/v1/jobs/{job}/logs", params={"offset": 10**12}).json()["lines"] == []

    jobs.store.cancel(job, "ada")
    jobs.step(3)
    streamed = client.get(f"/v1/jobs/{job}/logs/stream", headers={"Last-Event-ID": str(offset)}).text
    assert 'data: ["four"]' in streamed
    assert streamed.rstrip().endswith("event: end\ndata: null") or "event: end" in streamed


def test_events_are_streamed_from_where_a_client_was_cut_off(jobs: JobService) -> None:
    job = cancelled(jobs)
    client = jobs.client(Role.READ)
    events = client.get(f"/v1/jobs/{job}/events").json()["events"]
    assert [event["text"] for event in events] == [
        "submitted by a-submit",
        "a-submit requested cancellation",
        "cancelled: cancelled by a-submit",
    ]
    text = client.get(f"/v1/jobs/{job}/events/stream", headers={"Last-Event-ID": str(events[1]["id"])}).text
    assert text.count("event: event") == 1
    assert "cancelled by a-submit" in text
    assert "event: end" in text


def test_the_cluster_tells_who_holds_and_who_waits(jobs: JobService) -> None:
    first, second = jobs.submit(), jobs.submit(priority=2)
    jobs.step()
    view = jobs.client(Role.READ).get("/v1/cluster").json()
    assert view["nodes"] == [{"id": "n0de", "address": "127.0.0.1", "cpus": 2, "gpus": 0}]
    assert (view["free_cpus"], view["away"]) == (0, None)
    assert view["holding"] == [{"job": second, "workers": 2, "device": "cpu"}]
    assert [(one["job"], one["reason"]) for one in view["waiting"]] == [
        (first, f"2 CPUs requested, 0 free, held by {second}")
    ]


def test_metrics_and_readiness(jobs: JobService) -> None:
    client = jobs.client(None)
    assert client.get("/ready").status_code == 503
    jobs.submit()
    jobs.cluster.away = "connection refused"
    jobs.step()
    assert client.get("/ready").json() == {"ready": True, "cluster": {"up": False, "error": "connection refused"}}
    assert 'monge_jobs{state="queued"} 1.0' in client.get("/metrics").text


# Where a request comes from


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8200"}, 200),
        ({"Host": "[::1]:8200"}, 200),
        ({"Host": "evil.example:8200"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_foreign_pages_are_refused_on_loopback_alone(jobs: JobService, headers: dict[str, str], status: int) -> None:
    answer = jobs.client(Role.READ).get("/v1/jobs", headers=headers)
    assert answer.status_code == status
    assert (status == 200) == ("error" not in answer.json())
    assert jobs.client(Role.ADMIN, loopback=False).get("/v1/jobs", headers=headers).status_code == 200


def test_a_body_over_the_limit_is_refused(jobs: JobService) -> None:
    client: TestClient = jobs.client(Role.SUBMIT)
    answer = client.post("/v1/jobs", content=b" " * (2**20 + 1))
    assert (answer.status_code, answer.json()["error"]) == (413, "TooLargeError")
    chunks = (b" " * 2**18 for _ in range(5))
    assert client.post("/v1/jobs", content=chunks).status_code == 413


def test_a_fault_of_the_service_tells_its_request(jobs: JobService, caplog: pytest.LogCaptureFixture) -> None:
    client = jobs.client(Role.READ)
    jobs.controller.seen = Snapshot(Cluster(), None)  # type: ignore[arg-type]
    answer = client.get("/v1/cluster", headers={"X-Request-ID": "mine-1"})
    assert answer.status_code == 500
    assert answer.json()["request_id"] == "mine-1"
    assert "mine-1" in caplog.text
