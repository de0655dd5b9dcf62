"""The store, in SQLite and in PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from pipelines.errors import ConflictError, JobNotFoundError, ServiceError
from services.jobs.database import migrations, open_database
from services.jobs.documents import Submission, TokenRequest
from services.jobs.policy import EndAttempt, Move, turn
from services.jobs.rows import token_of
from services.jobs.server import make_owner
from services.jobs.states import State
from services.jobs.store import JobStore
from services.jobs.tables import Base, TokenRow
from services.settings import Settings
from services.tokens import FRESH, Role, Token
from services.training.origin import Origin
from services.training.placement import Placement
from tests.services.jobs.standin import job_spec, spec_document

SUBMISSION = Submission(spec=spec_document())


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a separate PostgreSQL server on a socket in a folder; yield its URL."""
    (programs,) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:] or [None]
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    folder = Path("/tmp") / f"monge-postgres-{os.getpid()}"  # paths of sockets may have 107 bytes
    folder.mkdir(mode=0o700)
    user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}  # it does not run as root
    if user:
        shutil.chown(folder, "postgres", "postgres")

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, **user)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stdout + done.stderr

    control = [str(programs / "pg_ctl"), "-D", str(folder / "data"), "-w"]
    run(str(programs / "initdb"), "-D", str(folder / "data"), "-U", "monge", "-A", "trust", "-E", "UTF8")
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    run(*control, "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql+psycopg://monge@/postgres?host={folder}"
    finally:
        run(*control, "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    url: str = request.getfixturevalue("postgres")
    with sa.create_engine(url).begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    return url


def test_migrations_make_the_tables_and_keep_what_is_there(url: str) -> None:
    store = JobStore(url)
    token = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT))
    job, _ = store.submit(job_spec(), SUBMISSION, token, None)
    store.close()
    again = JobStore(url)
    assert again.job(job.id).spec == job_spec().model_dump(mode="json")
    assert [one.name for one in again.tokens()] == ["ada"]
    again.close()
    with sa.create_engine(url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


@pytest.mark.parametrize("told", [False, True])
def test_migrations_bring_a_filled_store_of_the_first_version_up_to_date(url: str, told: bool) -> None:
    store = JobStore(url)
    token = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT))
    job, _ = store.submit(job_spec(), SUBMISSION, token, None)
    store.start(job.id, Placement(1, gpu=False), "it starts")
    run = {"event": "run", "run_id": "f00d", "experiment_id": "1"}
    store.report(job.id, 1, 10, [run])
    store.close()
    engine = open_database(url)
    with engine.begin() as connection:
        command.downgrade(migrations(connection), "0001")
        assert "tracked" in {column["name"] for column in sa.inspect(connection).get_columns("jobs")}
        if told:
            connection.execute(sa.text("UPDATE jobs SET tracked = state || ': ' || reason"))
    engine.dispose()
    again = JobStore(url)
    assert (again.job(job.id).attempts, again.job(job.id).origin) == (1, None)
    assert [one.run_id for one in again.untracked()] == ([] if told else ["f00d"])
    again.close()
    with sa.create_engine(url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_migrations_bring_a_filled_store_of_the_second_version_up_to_date(url: str) -> None:
    store = JobStore(url)
    token = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT))
    job, _ = store.submit(job_spec(), SUBMISSION, token, None)
    store.close()
    engine = open_database(url)
    with engine.begin() as connection:
        command.downgrade(migrations(connection), "0002")
        assert "origin" not in {column["name"] for column in sa.inspect(connection).get_columns("jobs")}
    engine.dispose()
    again = JobStore(url)
    assert again.job(job.id).origin is None
    other, _ = again.submit(job_spec(), SUBMISSION, token, None, Origin(job.id, 10_240))
    assert again.job(other.id).origin == f"{job.id}@10240"
    again.close()
    with sa.create_engine(url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_mlflow_is_told_again_of_a_job_that_moved_while_it_was_told(url: str) -> None:
    store = JobStore(url)
    token = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT))
    job, _ = store.submit(job_spec(), SUBMISSION, token, None)
    store.start(job.id, Placement(1, gpu=False), "it starts")
    assert store.untracked() == []  # there is no run yet
    store.report(job.id, 1, 10, [{"event": "run", "run_id": "f00d", "experiment_id": "1"}])
    (told,) = store.untracked()
    store.move([Move(job.id, State.RUNNING, "it trains")])
    store.tracked(told)
    (later,) = store.untracked()
    assert (later.state, later.reason) == (State.RUNNING, "it trains")
    store.tracked(later)
    assert store.untracked() == []
    store.move([Move(job.id, State.RUNNING, "it trains")])
    assert store.untracked() == []
    store.close()


def test_an_attempt_progresses_once_it_is_further_than_all_before_it(url: str) -> None:
    store = JobStore(url)
    token = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT))
    job, _ = store.submit(job_spec(), SUBMISSION, token, None)

    def sees(number: int, *images: int) -> bool:
        for seen in images:
            event = {"event": "progress", "images": seen, "total": 1000, "metrics": {}}
            store.report(job.id, number, seen, [event])
        (found,) = (one.attempt for one in store.unfinished())
        assert found == store.open_attempt(job.id)
        return found is not None and found.progressed

    store.start(job.id, Placement(1, gpu=False), "first")
    assert not sees(1, 100)
    assert sees(1, 500)
    store.end_attempt(EndAttempt(job.id, "lost", State.RECOVERING, "gone"), "")
    store.start(job.id, Placement(1, gpu=False), "second")
    assert not sees(2, 300, 400)
    store.end_attempt(EndAttempt(job.id, "lost", State.RECOVERING, "gone"), "")
    store.start(job.id, Placement(1, gpu=False), "third")
    assert not sees(3, 300, 500)
    assert sees(3, 600)
    store.close()


def test_a_token_is_remembered_until_one_is_revoked(url: str) -> None:
    store = JobStore(url)
    secret = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT)).secret
    assert store.authenticated(secret) is None
    assert store.authenticate(secret) == store.authenticated(secret) is not None
    assert store.authenticate("another") is store.authenticated("another") is None
    store.revoke("ada")
    assert store.authenticated(secret) is store.authenticate(secret) is None
    store.close()


def test_a_remembered_token_is_looked_up_again_after_a_while(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = JobStore(url), JobStore(url)
    secret = here.create_token(TokenRequest(name="ada", role=Role.SUBMIT)).secret
    assert here.authenticate(secret) is not None
    elsewhere.revoke("ada")
    assert here.authenticated(secret) is not None
    later = time.monotonic() + FRESH
    monkeypatch.setattr("services.jobs.store.time.monotonic", lambda: later)
    assert here.authenticated(secret) is here.authenticate(secret) is None
    here.close()
    elsewhere.close()


def test_a_token_that_is_revoked_while_it_is_looked_up_is_not_remembered(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(url)
    secret = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT)).secret

    def read_then_revoked(row: TokenRow) -> Token:
        token = token_of(row)
        if row.revoked is None:
            store.revoke("ada")
        return token

    monkeypatch.setattr("services.jobs.store.token_of", read_then_revoked)
    store.authenticate(secret)
    assert store.authenticated(secret) is None
    store.close()


def test_of_two_requests_with_one_key_at_once_one_makes_the_job(url: str) -> None:
    store = JobStore(url)
    token = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT))
    barrier, found = threading.Barrier(8), []

    def submit(key: str) -> None:
        barrier.wait()
        found.append((key, *store.submit(job_spec(), SUBMISSION, token, key)))

    threads = [threading.Thread(target=submit, args=(f"key {index % 2}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for key in ("key 0", "key 1"):
        assert len({job.id for one, job, _ in found if one == key}) == 1
        assert sum(new for one, _, new in found if one == key) == 1
    assert len(store.page().jobs) == 2
    store.close()


def test_labels_filter_and_the_queue_is_in_order(url: str) -> None:
    now = [1000.0]
    store = JobStore(url, lambda: now[0])
    token = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT))
    made = []
    for index, priority in enumerate((0, 0, 5, -1)):
        now[0] += 1
        asked = SUBMISSION.model_copy(update={"priority": priority, "labels": {"place": str(index)}})
        made.append(store.submit(job_spec(), asked, token, None)[0].id)
    assert [job.id for job in store.page(labels={"place": "2"}).jobs] == [made[2]]
    assert store.page(labels={"place": "2", "other": "x"}).jobs == []
    first = sorted(store.unfinished(), key=lambda job: -turn(job.priority, job.submitted))
    assert [job.id for job in first] == [made[2], made[0], made[1], made[3]]
    assert {job.id for job in store.unfinished(queue=2)} == {made[2], made[0]}
    store.close()


def test_what_is_over_cannot_be_cancelled_and_what_is_not_cannot_be_retried(url: str) -> None:
    store = JobStore(url)
    token = store.create_token(TokenRequest(name="ada", role=Role.SUBMIT))
    job = store.submit(job_spec(), SUBMISSION, token, None)[0].id
    with pytest.raises(ConflictError, match="is queued"):
        store.retry(job, "ada")
    with pytest.raises(JobNotFoundError, match=f"the latest are: {job}"):
        store.cancel("other", "ada")
    with pytest.raises(ConflictError, match="a token 'ada' exists"):
        store.create_token(TokenRequest(name="ada", role=Role.READ))
    assert store.counts() == {State.QUEUED: 1}
    store.close()


def test_secrets_are_not_kept(tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    made = store.create_token(TokenRequest(name="ada", role=Role.READ))
    found = store.authenticate(made.secret)
    assert found is not None
    assert found.name == "ada"
    assert store.authenticate(made.secret[:-1]) is None
    store.close()
    assert not any(made.secret.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_a_database_that_cannot_be_opened_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="cannot open the job store") as caught:
        JobStore(f"sqlite:///{tmp_path / 'no' / 'such' / 'jobs.db'}")
    assert caught.value.hint == "check MONGE_JOBS_STORE"


def test_the_owner_of_the_home_is_an_administrator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MONGE_TOKEN", raising=False)
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    settings = Settings(home=tmp_path)
    for _ in range(2):
        make_owner(store, settings)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    secret = settings.secret
    assert secret is not None
    owner = store.authenticate(secret)
    assert owner is not None
    assert (owner.role, len(store.tokens())) == (Role.ADMIN, 1)

    store.revoke(owner.name)
    with pytest.raises(ServiceError, match="was revoked"):
        make_owner(store, settings)
    (tmp_path / "token").unlink()
    make_owner(store, settings)
    assert Settings(home=tmp_path).secret != secret
    brought = Settings(home=tmp_path, token="brought-by-the-platform")
    make_owner(store, brought)
    assert store.authenticate("brought-by-the-platform") is not None
    assert "brought" not in repr(brought) + str(brought.for_workers())
    store.close()
