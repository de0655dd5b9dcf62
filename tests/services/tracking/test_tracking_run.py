"""The MLflow run of a job."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import CheckpointError, ServiceError
from services.tracking import opening
from services.tracking import run as run_module
from services.tracking.connection import can_retry_call, connect
from services.tracking.entries import read_entries, write_entries
from services.tracking.opening import Opened
from services.tracking.run import Run, find_run, mark_killed
from tests.services.tracking.stores import job_spec, open_run


def refuse(*args: object, **options: object) -> None:
    """Fail like a call of MLflow while the server is not available."""
    raise ConnectionError("refused")


def test_a_run_carries_the_spec_as_parameters_tags_and_file(uri: str, tmp_path: Path) -> None:
    spec = job_spec()
    run = Run.open(uri, "job-1", spec)
    client = connect(uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "RUNNING"
    assert stored.data.params["train.images"] == "100"
    assert stored.data.params["model.hidden"] == "[8]"
    assert stored.data.params["data.size"] == "null"
    assert stored.data.tags["monge.job"] == "job-1"
    assert stored.data.tags["monge.fingerprint"] == spec.fingerprint()
    assert Path(client.download_artifacts(run.run_id, "spec.yaml", str(tmp_path))).read_text() == spec.to_yaml()
    experiment = client.get_experiment(run.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    run.close()
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_a_parameter_longer_than_mlflow_takes_is_shortened(uri: str) -> None:
    spec = job_spec(data={"source": "x" * 10_000})
    run = Run.open(uri, "job-1", spec)
    value = connect(uri).get_run(run.run_id).data.params["data.source"]
    assert len(value) == 6_000
    assert value.endswith("x…")
    run.close()


def test_a_restarted_job_opens_the_same_run_again(uri: str) -> None:
    first = open_run(uri)
    first.metrics({"loss": 2.0}, images=10)
    first.close("FAILED")
    again = Run.open(uri, "job-1", job_spec(), first.run_id)
    assert again.run_id == first.run_id
    assert connect(uri).get_run(again.run_id).info.status == "RUNNING"
    again.metrics({"loss": 1.0}, images=20)
    again.close()
    points = connect(uri).get_metric_history(again.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(10, 2.0), (20, 1.0)]


def test_a_restarted_job_that_forgot_its_run_finds_it(uri: str) -> None:
    first = open_run(uri)
    again = open_run(uri)
    other = open_run(uri, "job-2")
    assert again.run_id == first.run_id == find_run(uri, "job-1")
    assert other.run_id != first.run_id
    assert find_run(uri, "job-3") is None
    for run in (first, again, other):
        run.close()


def test_more_workers_are_the_same_job_and_another_seed_is_not(uri: str) -> None:
    run = open_run(uri)
    run.close()
    Run.open(uri, "job-1", job_spec(workers={"count": 3})).close()
    with pytest.raises(ServiceError, match="fingerprint"):
        Run.open(uri, "job-1", job_spec(seed=1))


def test_a_run_that_is_gone_is_named(uri: str) -> None:
    with pytest.raises(ServiceError, match="f00d"):
        Run.open(uri, "job-1", job_spec(), "f00d")


def test_values_that_are_not_finite_become_tags_and_leave_the_curve_alone(uri: str) -> None:
    run = open_run(uri)
    run.metrics({"loss": 1.0, "gap": float("nan")}, images=10)
    run.metrics({"loss": float("inf"), "gap": float("nan")}, images=20)
    run.metrics({"loss": 0.5, "gap": 0.1}, images=30)
    run.close()
    client = connect(uri)
    assert [(p.step, p.value) for p in client.get_metric_history(run.run_id, "loss")] == [(10, 1.0), (30, 0.5)]
    assert [(p.step, p.value) for p in client.get_metric_history(run.run_id, "gap")] == [(30, 0.1)]
    tags = client.get_run(run.run_id).data.tags
    assert tags["not_finite.gap"] == "nan at 10 images"
    assert tags["not_finite.loss"] == "inf at 20 images"


def test_any_name_and_any_number_of_metrics(uri: str) -> None:
    run = open_run(uri)
    for images in range(0, 2500):
        run.metrics({"a (b)%": images}, images=images)
    run.close()
    assert len(connect(uri).get_metric_history(run.run_id, "a _b__")) == 2500


def test_pictures_and_figures_are_artifacts_by_step(uri: str, tmp_path: Path) -> None:
    run = open_run(uri)
    picture = np.zeros((8, 8), np.uint8)
    run.image("samples", picture, images=10)
    picture[:] = 255  # the caller may go on using its array
    run.image("samples", np.zeros((8, 8, 3), np.uint8), images=20)
    figure = tmp_path / "curve.png"
    figure.write_bytes(b"not really a picture")
    run.figure("loss curve", figure)
    figure.unlink()  # nor need its file stay
    run.close()
    client = connect(uri)
    names = sorted(file.path for file in client.list_artifacts(run.run_id, "images") if file.path.endswith("png"))
    assert [name.split("+")[:3] for name in names] == [
        ["images/samples", "step", "10"],
        ["images/samples", "step", "20"],
    ]
    from PIL import Image

    first = Image.open(client.download_artifacts(run.run_id, names[0], str(tmp_path)))
    assert np.asarray(first).max() == 0
    assert Path(client.download_artifacts(run.run_id, "figures/loss_curve.png", str(tmp_path))).read_bytes()
    assert client.get_run(run.run_id).data.tags["mlflow.loggedImages"] == "True"


@pytest.mark.parametrize("wrong", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8), np.float32), np.zeros(8, np.uint8)])
def test_what_is_no_picture_is_refused_at_once(uri: str, wrong: np.ndarray) -> None:
    run = open_run(uri)
    with pytest.raises(ValueError, match="uint8"):
        run.image("samples", wrong, images=0)
    run.close()


def test_system_metrics_are_sampled(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_SYSTEM_METRICS_EVERY", 0.0)
    run = open_run(uri)
    run.metrics({"loss": 1.0}, images=10)
    run.flush()  # the sample is put before what is due is sent
    run.flush()
    run.close()
    assert "system/system_memory_usage_percentage" in connect(uri).get_run(run.run_id).data.metrics


def test_a_server_that_goes_away_does_not_stop_training(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(uri)
    client = run._open().client
    with monkeypatch.context() as away:
        away.setattr(client, "log_batch", refuse)
        run.metrics({"loss": 1.0}, images=10)
        with pytest.raises(ServiceError, match="1 entries"):
            run.flush(timeout=0.6)
        run.metrics({"loss": 0.5}, images=20)
    run.close()
    assert [p.step for p in connect(uri).get_metric_history(run.run_id, "loss")] == [10, 20]


def test_a_server_that_stays_away_makes_only_close_fail() -> None:
    client = connect("http://127.0.0.1:9")  # the discard port, on which nothing listens
    run = Run("http://127.0.0.1:9", lambda: Opened(client, "f00d", "1"), lambda _: None)
    for images in range(100):
        run.metrics({"loss": 1.0}, images=images)
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        run.close(timeout=0.5)
    assert len(run.unsent()) == 100


def test_a_run_is_opened_when_mlflow_is_there_and_keeps_what_was_logged_before(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def refuse(*args: object) -> None:
        raise ServiceError("MLflow is away") from ConnectionError("refused")

    with monkeypatch.context() as away:
        away.setattr(run_module, "open_run", refuse)
        run = Run.later(uri, "job-1", job_spec(), on_open=lambda one: told.append(one.run_id))
        run.metrics({"loss": 1.0}, images=10)
        with pytest.raises(ServiceError, match="1 entries"):
            run.flush(timeout=0.6)
        with pytest.raises(ServiceError, match="away"):
            run.close(timeout=0.1)
        with pytest.raises(ServiceError, match="away"):
            _ = run.run_id
    run = Run.later(uri, "job-1", job_spec(), on_open=lambda one: told.append(one.run_id))
    run.metrics({"loss": 0.5}, images=20)
    run.close()
    assert told == [run.run_id] == [find_run(uri, "job-1")]
    assert [p.step for p in connect(uri).get_metric_history(run.run_id, "loss")] == [20]


def test_a_run_of_another_spec_is_refused_at_the_next_point(uri: str) -> None:
    open_run(uri).close()
    run = Run.later(uri, "job-1", job_spec(seed=1))
    with pytest.raises(ServiceError, match="fingerprint"):
        run.flush(30)
    with pytest.raises(ServiceError, match="fingerprint"):
        run.metrics({"loss": 0.5}, images=20)


def test_a_run_that_was_made_by_half_gets_the_rest(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*args: object) -> None:
        raise ConnectionError("refused")

    with monkeypatch.context() as broken:
        broken.setattr(opening, "_describe", cut_off)
        with pytest.raises(ServiceError, match="open the run"):
            open_run(uri)
    run = open_run(uri)
    stored = connect(uri).get_run(run.run_id)
    assert stored.data.params["train.images"] == "100"
    spec = connect(uri).download_artifacts(run.run_id, "spec.yaml", str(tmp_path))
    assert Path(spec).read_text() == job_spec().to_yaml()
    run.close()


def test_what_is_left_when_closing_fails_is_sent_later(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(uri)
    with monkeypatch.context() as away:
        away.setattr(run._open().client, "log_batch", refuse)
        run.metrics({"loss": 1.0}, images=10)
        with pytest.raises(ServiceError, match="1 entries"):
            run.close(timeout=0.6)
    run.close()
    assert [p.step for p in connect(uri).get_metric_history(run.run_id, "loss")] == [10]


def test_a_fault_of_this_machine_does_not_pass() -> None:
    assert can_retry_call(ConnectionError("refused"))
    assert not can_retry_call(OSError("no space left on device"))
    assert not can_retry_call(ServiceError("belongs to another spec"))
    wrapped = ServiceError("MLflow is away")
    wrapped.__cause__ = TimeoutError()
    assert can_retry_call(wrapped)


def test_closing_may_be_tried_again(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(uri)
    with monkeypatch.context() as away:
        away.setattr(run._open().client, "set_terminated", refuse)
        with pytest.raises(ServiceError, match="close run"):
            run.close()
    run.close()
    assert connect(uri).get_run(run.run_id).info.status == "FINISHED"


def test_a_restarted_job_sends_what_had_not_arrived_and_nothing_twice(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)

    first = open_run(uri)
    first.metrics({"loss": 4.0, "test_loss": 9.0}, images=10)
    first.image("samples/real", picture, images=10)
    first.flush()
    with monkeypatch.context() as away:  # the server goes away, a checkpoint is written, the worker dies
        for call in ("log_batch", "log_image", "set_tag", "log_stream"):
            away.setattr(first._open().client, call, refuse)
        first.metrics({"loss": 3.0}, images=20)
        first.image("samples/real", picture, images=20)
        first.tag("extractor", "a/1")
        first.figure("curve", _png(tmp_path))
        write_entries(first.unsent(), tmp_path)
        assert {type(entry).__name__ for entry in first.unsent()} == {"Point", "Picture", "Tag", "File"}

    kept = read_entries(tmp_path)
    for _ in range(2):  # two restarts from the same checkpoint
        again = open_run(uri)
        again.send_again(kept)
        again.metrics({"loss": 2.0}, images=30)
        again.metrics({"test_loss": 8.0}, images=30)
        again.image("samples/real", picture, images=30)
        again.flush()
    again.metrics({"loss": 1.0}, images=40)
    again.close()

    client = connect(uri)
    points = {name: client.get_metric_history(again.run_id, name) for name in ("loss", "test_loss")}
    assert [(point.step, point.value) for point in points["loss"]] == [(10, 4.0), (20, 3.0), (30, 2.0), (40, 1.0)]
    assert [(point.step, point.value) for point in points["test_loss"]] == [(10, 9.0), (30, 8.0)]
    images = [one.path for one in client.list_artifacts(again.run_id, "images") if one.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in images) == [10, 20, 30]
    shown = client.download_artifacts(again.run_id, next(path for path in images if "+20+" in path), str(tmp_path))
    assert np.array_equal(np.asarray(Image.open(shown)), picture)
    assert client.get_run(again.run_id).data.tags["extractor"] == "a/1"
    assert [one.path for one in client.list_artifacts(again.run_id, "figures")] == ["figures/curve.png"]
    first.close()


def test_a_damaged_file_of_entries_is_named(tmp_path: Path) -> None:
    assert read_entries(tmp_path) == []
    for content in (
        "[",
        '[{"kind": "point"}]',
        '[{"kind": "spell"}]',
        '[{"kind": "picture", "content": "AA=="}]',
        "[1]",
    ):
        (tmp_path / "unsent.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"unsent\.json"):
            read_entries(tmp_path)


def _png(folder: Path) -> Path:
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / "curve.png")
    return folder / "curve.png"


def test_opening_without_a_server_says_so() -> None:
    with pytest.raises(ServiceError, match="open the run") as caught:
        Run.open("http://127.0.0.1:9", "job-1", job_spec())
    assert "monge status" in str(caught.value.hint)


def test_a_cancelled_job_is_killed_and_an_ended_one_keeps_its_status(uri: str) -> None:
    running, ended = open_run(uri, "a"), open_run(uri, "b")
    ended.close("FINISHED")
    mark_killed(uri, running.run_id)
    mark_killed(uri, ended.run_id)
    client = connect(uri)
    assert client.get_run(running.run_id).info.status == "KILLED"
    assert client.get_run(ended.run_id).info.status == "FINISHED"
    with pytest.raises(ServiceError, match="f00d"):
        mark_killed(uri, "f00d")
