"""End-to-end tests on a real platform: from a folder of images to predictions of the endpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow.entities import Run
from PIL import Image

from benchmarks.faults import bits, curves, kill
from services.jobs.client import Jobs
from services.jobs.policy import DRAINING
from services.jobs.states import State
from services.platform.local import Platform
from services.platform.processes import free_port, wait_until
from services.settings import Settings
from services.tracking.connection import connect
from services.tracking.run import EXPERIMENT, find_run, read_run
from services.tuning.sweep import GRID_TAG
from tests.services.jobs.buckets import Bucket
from tests.services.jobs.living import (
    ROOT,
    Monge,
    adversary,
    checkpointed,
    classifier,
    family,
    platform,
    submitted,
    title,
    went_on,
    workers,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """Run an S3 server with an empty bucket ``shapes``; yield the environment of its clients."""
    bucket = Bucket()
    yield bucket.environment
    bucket.server.stop()


@pytest.fixture(scope="module")
def another_cluster() -> Iterator[None]:
    """Run another user's Ray head on this machine."""
    port = free_port()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MONGE_"))}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        head = psutil.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
                *("--node-ip-address", "127.0.0.1", "--port", str(port), "--include-dashboard=false"),
                *("--num-cpus", "0", "--temp-dir", folder, "--dashboard-agent-listen-port", str(free_port())),
                *("--min-worker-port", "0", "--max-worker-port", "0"),
            ],
            env=inherited, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert wait_until(lambda: any(p.name() == "raylet" for p in head.children(recursive=True)), timeout=60)
            yield
        finally:
            for process in [*head.children(recursive=True), head]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait(20)


@pytest.fixture(scope="module")
def monge(home: Path, s3: dict[str, str], another_cluster: None) -> Iterator[Monge]:
    with platform(home, s3) as run:
        yield run


def test_a_folder_of_ones_own_images_reaches_the_endpoint(monge: Monge, home: Path, shapes: Path) -> None:
    output = monge(*classifier("shapes", shapes, 12_000), "--follow")
    assert "skipped 1 image, listed in" in output
    assert "registering shapes@live" in output

    assert "shapes" in monge("models")
    for name in ("disc", "square"):
        answer = monge("predict", *(str(shapes / name / f"{index}.png") for index in range(10)), "--model", "shapes")
        assert len(re.findall(rf"│ {name} +│", answer)) >= 9, answer

    uri = Settings(home=home).address("mlflow_uri")
    record = read_run(uri, submitted(output), ["loss"])
    assert record.latest["test_accuracy"] >= 0.9
    assert record.series["loss"][-1] < record.series["loss"][0]
    run_id = find_run(uri, submitted(output))
    assert run_id is not None
    run = connect(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.kind"] == "lenet"
    assert any("predictions" in artifact.path for artifact in connect(uri).list_artifacts(run_id, "images"))


def test_shards_in_s3_are_trained_on_where_they_lie(monge: Monge, home: Path, shapes: Path) -> None:
    address = "s3://shapes/sharded"
    output = monge("shard", str(shapes), address, "--size", "28", "--workers", "2")
    assert re.search(r"121/121 .* images/s", output)
    assert "1 skipped" in output
    output = monge(*classifier("shapes-in-s3", address, 2_000, "data.size=28", "workers.count=2"), "--follow")
    assert f"reading shards of {address}" in output
    assert "registering shapes-in-s3@live" in output
    assert "hidden-key" not in output
    assert len(list((home / "cache" / "shards").glob("*.safetensors"))) == 1
    assert not (home / "cache" / "s3").exists()


def test_an_adversary_s_generator_is_judged_by_a_registered_classifier(monge: Monge, home: Path, shapes: Path) -> None:
    if "shapes" not in monge("models"):
        monge(*classifier("shapes", shapes, 12_000), "--follow")
    fields = [
        "name=forger", f"data.source={shapes}", "train.images=2048", "train.batch=64", "train.evaluate_every=10000",
        "model.width=4", "objective.critic.width=4", "evaluation.reference=shapes", "evaluation.samples=100",
    ]  # fmt: skip
    arguments = [word for field in fields for word in ("--set", field)]
    output = monge("submit", "configs/learned-transport.yaml", *arguments, "--follow")

    uri = Settings(home=home).address("mlflow_uri")
    record = read_run(uri, submitted(output), ["energy_distance", "plan_wait_ms"])
    assert {"test_fid", "test_fid_real", "test_coverage", "test_transport_cost"} <= record.latest.keys()
    assert record.latest["test_fid"] > record.latest["test_fid_real"] > 0
    assert record.tags["feature_extractor"].startswith("shapes/1 sha256:")
    assert min(record.series["plan_wait_ms"]) > 0
    run_id = find_run(uri, submitted(output))
    assert run_id is not None
    assert any("neighbours" in artifact.path for artifact in connect(uri).list_artifacts(run_id, "images"))

    output = monge("submit", "configs/gan.yaml", "--set", "evaluation.reference=nobody", "--follow", fails=True)
    assert "no model 'nobody@live' is registered" in output


def test_a_generator_is_trained_in_features_that_another_job_has_learned(
    monge: Monge, home: Path, shapes: Path, tmp_path: Path
) -> None:
    """Combines ranks, plans, features and a conditional generator."""

    def submit(config: str, *fields: str) -> str:
        common = (f"data.source={shapes}", "train.log_every=512", "train.evaluate_every=100000", "workers.count=2")
        arguments = [word for field in (*common, *fields) for word in ("--set", field)]
        return monge("submit", f"configs/{config}.yaml", *arguments, "--follow")

    output = submit("features-fashion-mnist", "name=features", "train.images=2048", "model.width=4", "model.code=8")
    assert "registering features@live" in output
    features = "[{network: pixels, side: 10}, {network: features, layer: 1}, {network: features}]"
    fields = ("name=told", "model={kind: biggan, latent: 12, width: 4}", f"objective.features={features}")
    more = (
        "objective.condition_weight=2",
        "train.images=2048",
        "train.batch=64",
        "objective.pool=256",
        "evaluation.samples=100",
    )
    output = submit("one-step", *fields, *more)
    assert "registering told@live" in output

    uri = Settings(home=home).address("mlflow_uri")
    record = read_run(uri, submitted(output), ["transport_cost", "drift", "plan_wait_ms"])
    assert record.series["drift"][-1] < record.series["drift"][0]
    assert all(milliseconds > 0 for milliseconds in record.series["plan_wait_ms"])
    with Jobs(Settings(home=home)) as jobs:
        assert jobs.get(submitted(output)).spec["objective"]["features"][1]["network"] == "features/1"

    pictures = []
    for name, more in (("one", ()), ("typical", ("--truncation", "0.2"))):
        monge("generate", "--model", "told", "--class", "disc", "--count", "4", *more, "--out", str(tmp_path / name))
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] != pictures[1]
    refused = monge("predict", str(shapes / "disc" / "0.png"), "--model", "features", fails=True)
    assert "'features@live' is an encoder" in refused


def test_a_drained_job_goes_on_where_it_stopped_and_a_cancelled_one_is_marked(
    monge: Monge, home: Path, shapes: Path
) -> None:
    job = submitted(
        monge(*classifier("endless", shapes, 10**9, "workers.count=2", "train.checkpoint_every=1000000000"))
    )
    with Jobs(Settings(home=home)) as jobs:
        assert wait_until(lambda: jobs.get(job).progress is not None, timeout=180)
        monge("drain")
        assert wait_until(lambda: jobs.get(job).reason.endswith(DRAINING), timeout=60)
        assert wait_until(lambda: not workers(home), timeout=30)
        monge("drain", "--end")
        assert wait_until(lambda: jobs.get(job).state is State.RUNNING, timeout=180)
    log = monge("logs", job)
    (images,) = re.findall(r"stopped at image ([\d,]+), with a checkpoint", log)
    assert f"from image {images}" in log.partition("stopped at image")[2]

    assert f"{job} is cancelled: cancelled by owner" in monge("cancel", job)

    uri = Settings(home=home).address("mlflow_uri")
    run_id = find_run(uri, job)
    assert run_id is not None
    assert connect(uri).get_run(run_id).info.status == "KILLED"
    assert wait_until(lambda: not workers(home), timeout=30)


@pytest.fixture(scope="module")
def uninterrupted(monge: Monge, shapes: Path) -> str:
    """Run a job without faults."""
    return submitted(monge("submit", *adversary("whole", shapes), "--follow"))


def test_an_adversarial_job_survives_the_death_of_worker_driver_services_and_cluster(
    monge: Monge, home: Path, shapes: Path, tmp_path: Path, uninterrupted: str
) -> None:
    """Runs from another folder, with a token that permits submission: two jobs on a machine with capacity for one."""
    secret = monge("token", "create", "ada", "--role", "submit").strip()
    elsewhere = {"MONGE_HOME": str(tmp_path), "MONGE_TOKEN": secret}
    elsewhere["MONGE_JOBS_URL"] = Settings(home=home).address("jobs_url")
    config, *fields = adversary("driver", shapes)
    first = submitted(monge("submit", str(ROOT / config), *fields, cwd=tmp_path, **elsewhere))
    config, *fields = classifier("next", shapes, 2_000, "workers.count=2")[1:]
    second = submitted(monge("submit", str(ROOT / config), *fields, cwd=tmp_path, **elsewhere))
    listed = next(line for line in monge("jobs", cwd=tmp_path, **elsewhere).splitlines() if second in line)
    assert "queued" in listed
    assert "2 CPUs requested, 0 free, held by driver-" in monge("jobs", second, cwd=tmp_path, **elsewhere)

    with Jobs(Settings(home=home)) as jobs:
        assert wait_until(lambda: checkpointed(home, first), timeout=180, interval=0.05)
        workers(home)[0].kill()
        assert wait_until(lambda: went_on(jobs, first, 1, beyond=3_000), timeout=120)
        assert jobs.get(first).attempts == 1
        service = Platform.read(home).processes["jobs"].process()
        assert service is not None
        service.kill()
    (driver,) = [one for one in family(home) if " -m services.jobs.driver " in title(one)[: len(sys.executable) + 30]]
    driver.kill()
    monge("up", "--cpus", "2")

    with Jobs(Settings(home=home)) as jobs:
        assert wait_until(lambda: went_on(jobs, first, 2), timeout=180)
        assert jobs.get(first).attempts == 2
        mlflow, head = (Platform.read(home).processes[name].process() for name in ("mlflow", "ray"))
        assert mlflow is not None
        assert head is not None
        kill(mlflow)
        assert wait_until(lambda: went_on(jobs, first, 2, beyond=9_500), timeout=180)
        kill(head)
    monge("up", "--cpus", "2")

    with Jobs(Settings(home=home)) as jobs:
        assert jobs.wait(first, timeout=240).state is State.SUCCEEDED
        assert jobs.wait(second, timeout=120).state is State.SUCCEEDED
        assert jobs.get(first).attempts == 3
        assert went_on(jobs, first, 3)
        run_id = jobs.get(first).run_id
    assert bits(home, first) == bits(home, uninterrupted)
    assert curves(home, first) == curves(home, uninterrupted)
    client = connect(Settings(home=home).address("mlflow_uri"))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`monge.job` = '{first}'")
    assert [(run.info.run_id, run.info.status) for run in runs] == [(run_id, "FINISHED")]
    assert wait_until(lambda: client.get_run(run_id).data.tags.get("monge.state") == "succeeded", timeout=60)
    story = monge("jobs", first, cwd=tmp_path, **elsewhere)
    assert "recovering: attempt 1 ended: its driver died" in story
    assert "multiple active Ray instances" not in monge("logs", first, cwd=tmp_path, **elsewhere)


def test_a_failing_job_says_why(monge: Monge, home: Path, shapes: Path) -> None:
    output = monge(*classifier("diverges", shapes, 4_000, "optimizer.learning_rate=1e30"), "--follow", fails=True)
    assert "loss is nan" in output
    assert "learning_rate" in output
    assert "Traceback" not in output


def test_a_damaged_shard_ends_the_job_on_every_rank(monge: Monge, home: Path, shapes: Path, uninterrupted: str) -> None:
    *_, shard = sorted((home / "data").rglob("shard-*.safetensors"), key=lambda path: path.stat().st_mtime)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        output = monge(*classifier("damaged", shapes, 200, "train.batch=20"), "--follow", fails=True)
    finally:
        shard.write_bytes(whole)
    assert f"{shard.name}: its sha256 is not the manifest's" in output
    assert output.count("hint:") == 1


def test_too_many_workers_are_refused_before_anything_is_read(monge: Monge, shapes: Path) -> None:
    output = monge(*classifier("crowd", shapes, 200, "workers.count=64"), "--follow", fails=True)
    assert "workers.count: 64 CPUs requested, the cluster has" in output
    assert output.count("hint:") == 1
    assert "sharding" not in output


def _swept(home: Path, *grid: str) -> list[str]:
    """Return the arguments of a sweep over small shapes."""
    arguments = [word for field in grid for word in ("--grid", field)]
    return [*arguments, "--out", str(home / "sweep.png")]


def _runs_of_the_last_sweep(home: Path) -> tuple[Run, list[Run]]:
    """Return the parent run of the last sweep, and its child runs."""
    client = connect(Settings(home=home).address("mlflow_uri"))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"]) if experiment else []
    parent = next(run for run in runs if GRID_TAG in run.data.tags)
    return parent, [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def test_a_sweep_compares_its_runs_and_reports_those_that_fail(monge: Monge, home: Path, shapes: Path) -> None:
    fields = classifier("swept", shapes, 2_000)[1:]
    output = monge("sweep", *fields, *_swept(home, "optimizer.learning_rate=[0.002, 1e30]", "seed=[0, 1]"))

    assert re.search(r"│ 0\.002 +│ 2 +│ \d", output), output
    assert re.search(r"│ 1e\+30 +│ 0, 2 failed +│ – ", output), output
    assert "learning_rate=1e+30, seed=0 failed: loss is nan" in output
    parent, runs = _runs_of_the_last_sweep(home)
    assert parent.info.status == "FINISHED"
    assert sorted(run.info.status for run in runs) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    accuracies = {run.data.params["seed"]: run.data.metrics["test_accuracy"] for run in runs if run.data.metrics}
    numbers = json.loads((home / "sweep.json").read_text())
    assert numbers["settings"][0]["test_accuracy"]["runs"] == [accuracies["0"], accuracies["1"]]
    figures = connect(Settings(home=home).address("mlflow_uri")).list_artifacts(parent.info.run_id, "figures")
    assert {artifact.path for artifact in figures} == {"figures/sweep.png", "figures/sweep.json"}
    assert Image.open(home / "sweep.png").width > 100
    assert not list((home / "sweeps").iterdir())


def test_an_interrupted_sweep_leaves_nothing_behind(monge: Monge, home: Path, shapes: Path) -> None:
    fields = classifier("endless-sweep", shapes, 10**9)[1:]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MONGE_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "sweep", *fields, *_swept(home, "seed=[0, 1, 2]")],
        cwd=ROOT, env={**inherited, "MONGE_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # A shell that runs the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )  # fmt: skip

    def trains() -> bool:
        assert process.poll() is None, process.stdout and process.stdout.read()
        try:
            parent, runs = _runs_of_the_last_sweep(home)
        except StopIteration:
            return False
        return "endless" in parent.info.run_name and any("loss" in run.data.metrics for run in runs)

    try:
        assert wait_until(trains, timeout=120, interval=1)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    parent, runs = _runs_of_the_last_sweep(home)
    assert {run.info.status for run in (parent, *runs)} == {"KILLED"}
    assert not list((home / "sweeps").iterdir())
    assert wait_until(lambda: not workers(home, "run_trial"), 30)


def test_status_and_a_second_up(monge: Monge, home: Path) -> None:
    before = Platform.read(home)
    assert monge("status").count("answers") == 5
    monge("up")
    assert Platform.read(home) == before


def test_a_dead_service_is_started_again(monge: Monge, home: Path) -> None:
    endpoint = Platform.read(home).processes["endpoint"].process()
    assert endpoint is not None
    endpoint.kill()
    endpoint.wait(10)
    monge("status", fails=True)

    monge("up")

    assert monge("status").count("answers") == 5


def test_jobs_are_remembered_over_down_and_up(monge: Monge) -> None:
    before = {"jobs --limit 0": monge("jobs", "--limit", "0")}
    job = re.findall(r"│ (\S+-\d{8}-\d{6}-\w{8}) ", before["jobs --limit 0"])[-1]
    for command in (f"jobs {job}", f"logs {job}"):
        before[command] = monge(*command.split())
    monge("down")
    monge("up", "--cpus", "2")
    assert {command: monge(*command.split()) for command in before} == before
