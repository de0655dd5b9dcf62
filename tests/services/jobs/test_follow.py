"""Following a job's log."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from pipelines.errors import SpecError, TrainingError
from services.jobs.follow import error_lines, follow, plain, show

LOG = [
    "2026-01-01 00:00:00,000\tINFO job_manager.py:1 -- Runtime env is setting up.",
    "[monge] joining the cluster",
    "[monge] joining the cluster",
    "\x1b[36m(RayTrainWorker pid=12)\x1b[0m [monge] training 10 parameters on 5 images, 2 workers, cpu",
    "(RayTrainWorker pid=12) [train] 10/20 images · loss 0.5",
    "(RayTrainWorker pid=12) [train] 20/20 images · loss 0.25",
]


def _shown(lines: list[str], terminal: bool = False) -> tuple[str, str | None, list[str]]:
    stages: list[str] = []
    output = io.StringIO()
    problem = show(lines, Console(file=output, force_terminal=terminal, width=120), stages.append)
    return output.getvalue(), problem, stages


def test_stages_and_progress_as_plain_lines() -> None:
    text, problem, stages = _shown(LOG)
    assert problem is None
    assert stages == [
        "joining the cluster",
        "joining the cluster",
        "training 10 parameters on 5 images, 2 workers, cpu",
    ]
    assert text.count("joining the cluster") == 1
    assert "[train] 20/20 images · loss 0.25" in text
    assert "Runtime env" not in text


def test_a_bar_on_a_terminal() -> None:
    text, _, _ = _shown(LOG, terminal=True)
    assert "20/20" in text
    assert "[train]" not in text


def test_the_jobs_error_comes_back_with_its_cure() -> None:
    _, problem, _ = _shown([*LOG, "[error] loss is nan", "  cure: lower optimizer.learning_rate", "other"])
    assert problem == "loss is nan\n  cure: lower optimizer.learning_rate"


def test_a_whole_error_is_written_and_read_again() -> None:
    error = TrainingError("gloo: connection refused\nremote=[192.0.2.1]\n  at pair.cc", cure="open the port")
    lines = error_lines(error).splitlines()
    assert lines[0] == "[error] gloo: connection refused"
    _, problem, _ = _shown([*LOG, *lines, "other"])
    assert problem == "gloo: connection refused\n  remote=[192.0.2.1]\n  at pair.cc\n  cure: open the port"


class _Ended:
    """A cluster with one job, which failed."""

    def logs(self, job: str, follow: bool) -> list[str]:
        return error_lines(SpecError("workers.count: 64 CPUs asked for", cure="ask for 2")).splitlines()

    def get(self, job: str) -> Any:
        return SimpleNamespace(status="FAILED", message="")


def test_an_error_has_one_cure() -> None:
    with pytest.raises(TrainingError) as caught:
        follow(cast(Any, _Ended()), "job", Console(file=io.StringIO()))
    assert str(caught.value) == "workers.count: 64 CPUs asked for\n  cure: ask for 2"


def test_plain_takes_off_rays_prefix_only() -> None:
    assert plain("(TrainController pid=3) text (kept) here") == "text (kept) here"
    assert plain("(an aside) text") == "(an aside) text"
