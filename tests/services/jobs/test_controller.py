"""The controller executes requests despite failures of drivers, of the cluster and of itself."""

from __future__ import annotations

import json
import shlex
from typing import Any

from services.jobs.documents import Job
from services.jobs.states import AttemptStatus, State
from tests.services.jobs.standin import JobService


def reported(event: str, **fields: Any) -> str:
    return "@monge " + json.dumps({"event": event, **fields}) + "\n"


def trained(images: int, at: float = 0.0) -> str:
    return reported("progress", images=images, total=640, metrics={"loss": 0.5}, at=at)


TRAINS = "a line of Ray's\n" + reported("stage", text="training 650 parameters", trains=True)


def running(jobs: JobService, **fields: Any) -> tuple[str, Any]:
    """Create a training job and its driver."""
    job = jobs.submit(**fields)
    jobs.step()
    driver = jobs.cluster.drivers[f"{job}-a1"]
    driver.status, driver.log = AttemptStatus.RUNNING, TRAINS
    jobs.step(2)
    assert jobs.store.job(job).state is State.RUNNING
    return job, driver


def test_a_job_is_started_followed_and_ended(jobs: JobService) -> None:
    job, driver = running(jobs)
    words = shlex.split(driver.command)
    assert words[:3] == ["exec", "env", f"MONGE_HOME={jobs.folder}"]
    driver_of = ["python3", "-m", "services.jobs.driver", "--job", job, "--attempt", "1", "--workers", "2", "--spec"]
    assert words[3:-1] == driver_of
    assert json.loads(words[-1])["workers"]["count"] == 2

    driver.log += reported("run", run_id="f00d", experiment_id="1") + trained(64, 10.0) + trained(320, 12.0)
    jobs.step(2)
    progress = jobs.store.job(job).progress
    assert progress is not None
    assert (progress.images, progress.images_per_second, progress.seconds_left) == (320, 128.0, 2.5)

    driver.log += reported("done", model="digits/1")
    driver.status = AttemptStatus.SUCCEEDED
    jobs.step(3)
    ended = jobs.store.job(job)
    assert (ended.state, ended.model, ended.run_id, ended.attempts) == (State.SUCCEEDED, "digits/1", "f00d", 1)
    assert [one.outcome for one in ended.attempt_list] == ["succeeded"]
    assert (jobs.tracked[-1].run_id, jobs.tracked[-1].state) == ("f00d", State.SUCCEEDED)


def test_the_second_job_waits_and_says_for_what(jobs: JobService) -> None:
    first, driver = running(jobs)
    second = jobs.submit()
    jobs.step()
    waiting = jobs.store.job(second)
    assert (waiting.state, waiting.reason) == (State.QUEUED, f"2 CPUs requested, 0 free, held by {first}")
    driver.status = AttemptStatus.SUCCEEDED
    jobs.step(3)
    assert jobs.store.job(second).state is State.STARTING


def test_a_dead_driver_is_followed_by_another_attempt(jobs: JobService) -> None:
    job, driver = running(jobs)
    driver.log += trained(64) + trained(128)
    driver.status, driver.message = AttemptStatus.FAILED, "killed by signal 9\nmore"
    jobs.step(2)
    found = jobs.store.job(job)
    assert found.state is State.RECOVERING
    assert "its driver died: killed by signal 9" in found.reason
    wait_for_attempt(jobs, job, 2)
    assert jobs.store.job(job).attempt_list[0].outcome == "lost"


def test_an_error_of_the_job_itself_is_final(jobs: JobService) -> None:
    job, driver = running(jobs)
    driver.log += reported("error", message="loss is nan", hint="lower optimizer.learning_rate")
    driver.status = AttemptStatus.FAILED
    jobs.step(3)
    found = jobs.store.job(job)
    assert (found.state, found.attempts) == (State.FAILED, 1)
    assert found.reason == "loss is nan\n  hint: lower optimizer.learning_rate"


def test_a_service_that_is_away_is_no_error_of_the_job(jobs: JobService) -> None:
    job, driver = running(jobs)
    driver.log += reported("error", message="MLflow is away", hint=None, final=False)
    driver.status, driver.message = AttemptStatus.FAILED, "Job entrypoint command failed with exit code 1"
    jobs.step(3)
    found = jobs.store.job(job)
    assert found.state is State.RECOVERING
    assert "attempt 1 ended: MLflow is away" in found.reason


def test_the_last_line_of_a_dead_driver_counts(jobs: JobService) -> None:
    job, driver = running(jobs)
    driver.log += reported("error", message="loss is nan", hint=None).rstrip("\n")  # it died while it wrote
    driver.status = AttemptStatus.FAILED
    jobs.step(3)
    assert jobs.store.job(job).reason == "loss is nan"


def test_a_restarted_service_goes_on_where_it_was(jobs: JobService) -> None:
    job, driver = running(jobs)
    driver.log += trained(64)
    jobs.step(2)
    log, events = jobs.logs.page(job, 0, False), jobs.store.events(job)
    jobs.restart()
    jobs.step(3)
    assert jobs.logs.page(job, 0, False) == log
    assert jobs.store.events(job) == events
    assert list(jobs.cluster.drivers) == [f"{job}-a1"]
    driver.log += trained(128)
    jobs.step(2)
    progress = jobs.store.job(job).progress
    assert progress is not None
    assert progress.images == 128
    assert jobs.logs.page(job, log.next, False).lines == ["[train] 128/640 images · loss 0.5"]


def test_a_lost_answer_starts_no_second_driver(jobs: JobService) -> None:
    jobs.cluster.loses_answers = True
    job = jobs.submit()
    jobs.step()
    jobs.restart()
    jobs.step(3)
    assert list(jobs.cluster.drivers) == [f"{job}-a1"]
    attempt = jobs.store.unfinished()[0].attempt
    assert attempt is not None
    assert attempt.sent


def test_while_the_cluster_is_away_a_job_waits_for_it(jobs: JobService) -> None:
    job, _ = running(jobs)
    jobs.cluster.away = "connection refused"
    jobs.step()
    found = jobs.store.job(job)
    assert found.state is State.RECOVERING
    assert "the cluster is unreachable (connection refused)" in found.reason
    jobs.cluster.away = None
    jobs.step()
    assert jobs.store.job(job).state is State.RUNNING
    jobs.cluster.drivers.clear()  # another head, which knows nothing
    jobs.step()
    assert "the cluster lost the attempt" in jobs.store.job(job).reason
    wait_for_attempt(jobs, job, 2)


def test_a_cancelled_job_is_stopped_and_mlflow_told_when_it_is_there(jobs: JobService) -> None:
    job, driver = running(jobs)
    driver.log += reported("run", run_id="f00d", experiment_id="1")
    jobs.mlflow_away = True
    jobs.step(2)
    jobs.store.cancel(job, "ada")
    jobs.step(3)
    assert jobs.cluster.stopped == [f"{job}-a1"]
    found: Job = jobs.store.job(job)
    assert (found.state, found.reason) == (State.CANCELLED, "cancelled by ada")
    assert jobs.store.untracked()
    jobs.mlflow_away = False
    jobs.restart()
    jobs.step(2)
    assert [(told.state, told.reason) for told in jobs.tracked] == [(State.CANCELLED, "cancelled by ada")]
    assert not jobs.store.untracked()


def test_draining_stops_what_runs_until_later(jobs: JobService) -> None:
    job, driver = running(jobs)
    driver.log += trained(64) + trained(128)
    waiting = jobs.submit(priority=5)
    jobs.store.drain(True)
    jobs.step(2)
    jobs.store.drain(False)  # before the driver is seen to have ended
    jobs.store.drain(True)
    jobs.step(3)
    assert jobs.cluster.stopped == [f"{job}-a1"]
    stopped = jobs.store.job(job)
    assert stopped.state is State.RECOVERING
    assert stopped.reason == ("attempt 1 ended: the service is draining; no job starts until `monge drain --end`")
    assert jobs.store.job(waiting).reason == "no job starts until `monge drain --end`"
    jobs.store.drain(False)
    wait_for_attempt(jobs, job, 2)
    assert jobs.store.job(waiting).attempts == 0


def test_a_retried_job_keeps_its_run_and_counts_on(jobs: JobService) -> None:
    job, driver = running(jobs)
    driver.log += reported("error", message="loss is nan", hint=None)
    driver.status = AttemptStatus.FAILED
    jobs.step(3)
    jobs.store.retry(job, "ada")
    jobs.step()
    assert f"{job}-a2" in jobs.cluster.drivers
    assert jobs.store.job(job).attempts == 2


def wait_for_attempt(jobs: JobService, job: str, number: int) -> None:
    for _ in range(500):
        if f"{job}-a{number}" in jobs.cluster.drivers:
            return
        jobs.step()
    raise AssertionError(jobs.store.job(job))
