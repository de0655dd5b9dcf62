"""Following a job's log."""

from __future__ import annotations

import io

from rich.console import Console

from services.jobs.follow import plain, show

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


def test_plain_takes_off_rays_prefix_only() -> None:
    assert plain("(TrainController pid=3) text (kept) here") == "text (kept) here"
    assert plain("(an aside) text") == "(an aside) text"
