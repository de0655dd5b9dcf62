"""The command line: help texts, and errors as one readable message."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipelines.errors import SpecError
from pipelines.spec import JobSpec, load_spec
from services import terminal
from services.cli import app
from services.jobs.documents import DryRun, Job
from services.jobs.paths import with_absolute_paths
from services.jobs.states import State
from tests.services.jobs.standin import OpenedJobs

ROOT = Path(__file__).parents[3]
LENET = ROOT / "configs" / "lenet.yaml"


def monge(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MONGE_HOME": str(home), "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    commands = (
        "up down status submit shard sweep jobs logs cancel retry cluster nodes drain token models predict generate"
    )
    commands += " doctor demo schema serve transport node"
    for command in commands.split():
        assert f" {command} " in text


def test_dry_run_prints_the_resolved_spec(tmp_path: Path) -> None:
    done = monge("submit", str(LENET), "--set", "train.images=1000", "--dry-run", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "images: 1000" in done.stdout
    assert "test_fraction: 0.2" in done.stdout


def test_a_wrong_field_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    done = monge("submit", str(LENET), "--set", "train.imagse=1000", "--dry-run", home=tmp_path)
    assert done.returncode == 1
    assert "train.imagse: no such field (received 1000)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_grid_is_told_before_anything_runs(tmp_path: Path) -> None:
    done = monge("sweep", str(LENET), "--grid", "seed=[0, -1]", home=tmp_path)
    assert done.returncode == 1
    assert "seed: must be greater than or equal to 0 (received -1)" in done.stderr
    done = monge("sweep", str(LENET), "--grid", "seed=[0, 1]", home=tmp_path)
    assert done.returncode == 1
    assert "monge up" in done.stderr
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = monge("submit", "no-such.yaml", "--debug", home=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "no-such.yaml: no such file" in done.stderr


@pytest.mark.parametrize(
    "command", [["jobs"], ["models"], ["generate", "--model", "m"], ["cancel", "j"], ["token", "list"]]
)
def test_without_a_platform_the_hint_is_named(command: list[str], tmp_path: Path) -> None:
    done = monge(*command, home=tmp_path)
    assert done.returncode == 1
    assert "monge up" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_of_nothing_is_a_table_and_a_failure(tmp_path: Path) -> None:
    done = monge("status", home=tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("down") == 5


def test_a_relative_source_is_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    spec = with_absolute_paths(load_spec(LENET, ["data.source=mine"]))
    assert spec.data.source == str(tmp_path / "mine")
    catalogue = load_spec(LENET)
    assert with_absolute_paths(catalogue) == catalogue
    bucket = load_spec(LENET, ["data.source=s3://bucket/prefix"])
    assert with_absolute_paths(bucket) == bucket
    with pytest.raises(SpecError, match="must not contain keys") as refusal:
        with_absolute_paths(load_spec(LENET, ["data.source=s3://key:secret@bucket/prefix"]))
    assert "secret" not in str(refusal.value)


NOW = datetime(2026, 11, 27, 9, 36, 4, tzinfo=UTC)
JOB = Job(
    id="a-job-of-a-name-as-long-as-people-give-20261127-093604-ab12",
    number=1,
    name="a-job-of-a-name-as-long-as-people-give",
    kind="classification",
    state=State.QUEUED,
    reason="2 CPUs requested, 0 free, held by one-20261127-093000-12ab",
    since=NOW,
    submitted=NOW,
    started=None,
    ended=None,
    owner="ada",
    priority=0,
    labels={},
    timeout=None,
    attempts=0,
    progress=None,
    run_id=None,
    run_url=None,
    model=None,
)


class FakeJobs(OpenedJobs):
    """A job service with one job with a long id."""

    submitted = 0

    def plan(self, spec: JobSpec, wait: bool, origin: str | None) -> DryRun:
        return DryRun(lines=["data: what there is", f"workers: {spec.workers.count}"])

    def submit(self, spec: JobSpec, **_: object) -> Job:
        FakeJobs.submitted += 1
        return JOB

    def find(self, limit: int) -> list[Job]:
        return [JOB]


@pytest.mark.parametrize(("answer", "submitted"), [("y", 1), ("n", 0)])
def test_ask_shows_the_plan_and_waits_for_a_yes(monkeypatch: pytest.MonkeyPatch, answer: str, submitted: int) -> None:
    monkeypatch.setattr("services.jobs.client.Jobs", FakeJobs)
    monkeypatch.setattr(FakeJobs, "submitted", 0)
    monkeypatch.setattr(terminal, "console", Console(width=80))
    done = CliRunner().invoke(app, ["submit", str(LENET), "--ask"], input=f"{answer}\n")
    assert done.exit_code == (0 if submitted else 1)
    assert done.output.index("data: what there is") < done.output.index("submit it?")
    assert FakeJobs.submitted == submitted


def test_an_interrupted_follower_says_that_the_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("services.jobs.client.Jobs", FakeJobs)
    monkeypatch.setattr("services.jobs.follow.follow", interrupted)
    monkeypatch.setattr(terminal, "console", Console(width=80))
    done = CliRunner().invoke(app, ["submit", str(LENET), "--follow"])
    assert done.exit_code == 130
    job = JOB.id
    for line in (
        f"job {job} continues",
        f"follow it with: monge logs {job} --follow",
        f"stop it with: monge cancel {job}",
    ):
        assert f"  {line}\n" in done.output


@pytest.mark.parametrize("on_terminal", [True, False])
def test_jobs_are_told_whole(monkeypatch: pytest.MonkeyPatch, on_terminal: bool) -> None:
    monkeypatch.setattr("services.jobs.client.Jobs", FakeJobs)
    written = io.StringIO()
    monkeypatch.setattr(
        terminal, "console", Console(file=written, width=80, force_terminal=on_terminal, color_system=None)
    )
    assert CliRunner().invoke(app, ["jobs"]).exit_code == 0
    lines = written.getvalue().splitlines()
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines if line.startswith("│")]
    columns = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in plain]
    job, state, _, why = zip(*columns, strict=True)
    assert "".join(job) == JOB.id
    assert state[0] == "queued"
    assert " ".join(why).split() == JOB.reason.split()
    assert (len(plain) == 1) == (not on_terminal)
    assert not on_terminal or max(map(len, lines)) <= 80
