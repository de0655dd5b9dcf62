"""Reports of drivers and workers, as read by the job service and by people."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import SpecError
from services.training.progress import (
    format_line,
    read_event,
    report_done,
    report_error,
    report_progress,
    report_run,
    report_stage,
)


@given(images=st.integers(0, 10**12), total=st.integers(1, 10**12), value=st.floats())
def test_progress_comes_back_as_it_was(images: int, total: int, value: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        report_progress(images, total, {"loss": value})
    event = read_event(printed[0])
    assert event is not None
    assert (event["images"], event["total"]) == (images, total)
    assert event["metrics"] == ({"loss": value} if math.isfinite(value) else {})
    assert format_line(printed[0])[0].startswith(f"[train] {images:,}/{total:,} images")


def test_reports_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    report_stage("joining the cluster")
    report_run("abc", "1")
    report_progress(1000, 20_000, {"loss": 0.25, "images_per_second": 3456.7})
    report_error(SpecError("loss is nan\nat the first step", hint="lower optimizer.learning_rate"))
    report_done(None)
    report_done("cats/1")
    lines = capsys.readouterr().out.splitlines()
    assert [word for line in lines for word in format_line("(RayTrainWorker pid=7, ip=127.0.0.1) " + line)] == [
        "[monge] joining the cluster",
        "[monge] MLflow run abc",
        "[train] 1,000/20,000 images · loss 0.25 · images_per_second 3,457",
        "[error] loss is nan",
        "  at the first step",
        "  hint: lower optimizer.learning_rate",
        "[monge] done: no model registered",
        "[monge] done: cats/1",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "Traceback (most recent call last):",
        "@monge not JSON",
        '@monge ["a"]',
        '@monge {"a": 1}',
        "@monge " + "[" * 10**5,
    ],
)
def test_other_lines_report_nothing(line: str) -> None:
    assert read_event(line) is None
    assert format_line(line) == [line]


def test_only_rays_own_prefix_is_taken_off() -> None:
    assert format_line("\x1b[36m(TrainController pid=3)\x1b[0m text (kept) here") == ["text (kept) here"]
    assert format_line("(an aside) text") == ["(an aside) text"]
