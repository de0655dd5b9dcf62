"""A job that continues another one: validation at submission, retention of checkpoints, arguments of the driver."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from pipelines.errors import CheckpointError, SpecError
from services.cli import app
from services.jobs import driver
from services.jobs.client import Jobs
from services.jobs.states import AttemptStatus, State
from services.settings import Settings
from services.tokens import Role
from services.training.origin import FILES, Origin
from tests.services.jobs.standin import JobService, job_spec, spec_document


def keep(home: Path, job: str, *names: str) -> None:
    """Create folders like those of checkpoints."""
    for name in names:
        (home / "jobs" / job / name).mkdir(parents=True)
        for file in FILES:
            (home / "jobs" / job / name / file).touch()


@pytest.fixture
def ended(jobs: JobService) -> str:
    """Create a finished job of another owner, with checkpoints at 256 and 640 images."""
    job = jobs.submit("somebody")
    jobs.step()
    jobs.cluster.drivers[f"{job}-a1"].status = AttemptStatus.SUCCEEDED
    jobs.step(3)
    assert jobs.store.state(job) is State.SUCCEEDED
    keep(jobs.folder, job, "images-000000000256", "images-000000000640", "images-000000000640-2")
    return job


def asked(origin: str, images: int = 1280, **fields: Any) -> dict[str, Any]:
    return {"spec": spec_document(**({"train": {"images": images}} | fields)), "origin": origin}


@pytest.mark.parametrize(("which", "images"), [("", 640), ("@256", 256), ("@640", 640)])
def test_a_job_that_is_over_is_continued_from_a_checkpoint(
    jobs: JobService, ended: str, which: str, images: int
) -> None:
    client = jobs.client(Role.SUBMIT)
    planned = client.post("/v1/plans", json=asked(ended + which)).json()
    assert f"from: {ended}@{images}" in planned["lines"]
    job = client.post("/v1/jobs", json=asked(ended + which)).json()
    assert job["origin"] == f"{ended}@{images}"
    assert job["id"] != ended
    assert client.get(f"/v1/jobs/{job['id']}").json()["origin"] == job["origin"]
    assert client.get(f"/v1/jobs/{ended}").json()["origin"] is None
    jobs.step()
    words = shlex.split(jobs.cluster.drivers[f"{job['id']}-a1"].command)
    assert words[-2:] == ["--from", job["origin"]]


def test_a_retried_job_keeps_its_origin(jobs: JobService, ended: str) -> None:
    client = jobs.client(Role.SUBMIT)
    job = client.post("/v1/jobs", json=asked(f"{ended}@256")).json()["id"]
    jobs.step()
    client.delete(f"/v1/jobs/{job}")
    jobs.step(3)
    assert client.post(f"/v1/jobs/{job}/retry").json()["origin"] == f"{ended}@256"
    jobs.step()
    assert f"--from {ended}@256" in jobs.cluster.drivers[f"{job}-a2"].command


def test_a_key_stands_for_one_origin(jobs: JobService, ended: str) -> None:
    client, key = jobs.client(Role.SUBMIT), {"Idempotency-Key": "k"}
    first = client.post("/v1/jobs", json=asked(ended), headers=key)
    again = client.post("/v1/jobs", json=asked(ended), headers=key)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert client.post("/v1/jobs", json=asked(f"{ended}@256"), headers=key).status_code == 409
    assert client.post("/v1/jobs", json={"spec": asked(ended)["spec"]}, headers=key).status_code == 409


def test_the_origin_of_a_spec_in_yaml_is_in_the_query(jobs: JobService, ended: str) -> None:
    answer = jobs.client(Role.SUBMIT).post(
        "/v1/jobs",
        params={"origin": f"{ended}@256"},
        content=yaml.safe_dump(asked(ended)["spec"]),
        headers={"Content-Type": "application/yaml"},
    )
    assert answer.json()["origin"] == f"{ended}@256"


@pytest.mark.parametrize(
    ("origin", "fields", "field", "message", "hint"),
    [
        ("nobody", {}, "origin", "no job 'nobody'; the latest are: {job}", "see `monge jobs`"),
        ("{job}@many", {}, "origin", "'{job}@many' is neither JOB nor JOB@IMAGES", "see `monge jobs`"),
        ("../x", {}, "origin", "'../x' is neither JOB nor JOB@IMAGES", "see `monge jobs`"),
        ("{job}@300", {}, "origin", "{job}@300 does not exist; {job} has checkpoints at 256, 640 images",
         "use one of them, such as {job}@640"),
        ("{job}", {"images": 640}, "train.images", "640, but the checkpoint to continue from has already seen 640",
         "raise train.images above 640"),
        ("{job}", {"model": {"kind": "mlp"}}, "model.kind", "'mlp', but {job} has 'perceptron'",
         "use model.kind perceptron; only rates and images may change"),
        ("{job}", {"objective": {"kind": "regression", "target": "waves"}}, "objective.kind",
         "'regression', but {job} has 'classification'",
         "use objective.kind classification; only rates and images may change"),
        ("{job}", {"optimizer": {"kind": "sgd"}}, "optimizer.kind", "'sgd', but {job} has 'adam'",
         "use optimizer.kind adam; only rates and images may change"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued_is_told_at_submission(
    jobs: JobService, ended: str, origin: str, fields: dict[str, Any], field: str, message: str, hint: str
) -> None:
    client = jobs.client(Role.SUBMIT)
    for route in ("/v1/jobs", "/v1/plans"):
        answer = client.post(route, json=asked(origin.format(job=ended), **fields))
        document = answer.json()
        assert (answer.status_code, document["error"], document["field"]) == (422, "SpecError", field)
        assert document["message"] == f"{field}: {message.format(job=ended)}"
        assert document["hint"] == hint.format(job=ended)
    assert [job["id"] for job in client.get("/v1/jobs").json()["jobs"]] == [ended]


def test_a_job_that_is_not_over_is_not_continued(jobs: JobService) -> None:
    job = jobs.submit()
    document = jobs.client(Role.SUBMIT).post("/v1/jobs", json=asked(job)).json()
    assert (document["field"], document["message"]) == ("origin", f"origin: job {job} is queued")
    assert document["hint"] == f"wait until it ends, or cancel it with `monge cancel {job}`"


def test_a_job_that_never_started_has_no_checkpoint(jobs: JobService) -> None:
    job = jobs.submit()
    jobs.store.cancel(job, "ada")
    jobs.step()
    document = jobs.client(Role.SUBMIT).post("/v1/jobs", json=asked(job)).json()
    assert document["message"] == f"origin: {job} has no checkpoint in {jobs.folder / 'jobs'}"


def test_checkpoints_that_the_service_does_not_see_are_left_to_the_driver(jobs: JobService) -> None:
    job = jobs.submit()
    jobs.step()
    jobs.cluster.drivers[f"{job}-a1"].status = AttemptStatus.FAILED
    jobs.store.cancel(job, "ada")
    jobs.step(3)
    continued = jobs.client(Role.SUBMIT).post("/v1/jobs", json=asked(job)).json()
    assert continued["origin"] == job


# The driver


def test_the_driver_finds_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path, "first", "images-000000000256", "images-000000000640")
    settings, spec = Settings(home=tmp_path), job_spec(train={"images": 1280})
    assert driver._origin("second", spec, settings, Origin("first")) == Origin("first", 640)
    assert "starting from images-000000000640 of first" in capsys.readouterr().out
    assert driver._origin("second", spec, settings, None) is None
    with pytest.raises(SpecError, match=r"train\.images: 640"):
        driver._origin("second", job_spec(), settings, Origin("first"))


def test_the_driver_refuses_for_good_what_is_not_kept(tmp_path: Path) -> None:
    keep(tmp_path, "first", "images-000000000256")
    settings, spec = Settings(home=tmp_path), job_spec(train={"images": 1280})
    for origin in (Origin("first", 640), Origin("nobody")):
        with pytest.raises(CheckpointError, match=f"origin: .*{origin.job}") as refused:
            driver._origin("second", spec, settings, origin)
        assert not driver.can_retry_job(refused.value)


def test_a_job_with_checkpoints_of_its_own_needs_its_origin_no_more(tmp_path: Path) -> None:
    keep(tmp_path, "second", "images-000000000700")
    spec = job_spec(train={"images": 1280})
    assert driver._origin("second", spec, Settings(home=tmp_path), Origin("first", 640)) == Origin("first", 640)


# The command line


def test_the_command_passes_the_origin_on_and_shows_it(
    jobs: JobService, ended: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = jobs.client(Role.SUBMIT)
    address = Settings(home=tmp_path, jobs_url="http://testserver")
    monkeypatch.setattr("services.jobs.commands.load_settings", lambda: address)
    monkeypatch.setattr("services.jobs.client.httpx.Client", lambda **_: TestClient(client.app, headers=client.headers))
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(spec_document()))
    longer = ["submit", str(spec), "--set", "train.images=1280", "--from"]
    done = CliRunner().invoke(app, [*longer, f"{ended}@256"])
    assert done.exit_code == 0, done.output
    assert f"from: {ended}@256" in done.output
    (job, _) = Jobs(address).find()
    told = CliRunner().invoke(app, ["jobs", job.id]).output
    assert f"{ended}@256" in told
    refused = CliRunner().invoke(app, [*longer, f"{ended}@300"])
    assert isinstance(refused.exception, SpecError)
    assert "256, 640 images" in str(refused.exception)
