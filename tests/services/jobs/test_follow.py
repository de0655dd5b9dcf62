"""Following a job on a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from pipelines.errors import TrainingError
from services.jobs.documents import Event, JobProgress
from services.jobs.follow import follow, show
from services.jobs.states import State


def event(text: str, kind: str = "stage", state: State | None = None) -> Event:
    return Event(id=1, at=datetime.now(UTC), attempt=1, kind=kind, text=text, state=state)


STORY: list[Event | JobProgress] = [
    event("queued: 2 CPUs requested, 0 free, held by X", "state"),
    event("training 10 parameters on 5 images, 2 workers, cpu"),
    JobProgress(images=10, total=20, metrics={"loss": 0.5, "accuracy": 0.75}),
    JobProgress(images=20, total=20, metrics={"loss": 0.25, "accuracy": 0.75}),
    event("loss is nan", "error"),
    event("failed: loss is nan", "state", State.FAILED),
]


def shown(terminal: bool = False) -> tuple[str, list[str]]:
    heard: list[str] = []
    output = io.StringIO()
    show(STORY, Console(file=output, force_terminal=terminal, width=120), lambda event: heard.append(event.text))
    return output.getvalue(), heard


def test_states_stages_and_progress_are_plain_lines() -> None:
    text, heard = shown()
    assert heard == [one.text for one in STORY if isinstance(one, Event)]
    assert text.splitlines() == [
        "  queued: 2 CPUs requested, 0 free, held by X",
        "  training 10 parameters on 5 images, 2 workers, cpu",
        "  10/20 images · loss 0.5 · accuracy 0.75",
        "  20/20 images · loss 0.25",
    ]


def test_a_bar_on_a_terminal() -> None:
    text, _ = shown(terminal=True)
    assert "20/20" in text
    assert "20/20 images" not in text


class Service:
    """A job service with one job."""

    def __init__(self, state: State, reason: str) -> None:
        self.ended = SimpleNamespace(state=state, reason=reason)

    def follow(self, job: str) -> Iterator[Event | JobProgress]:
        return iter(STORY)

    def get(self, job: str) -> Any:
        return self.ended


def followed(state: State, reason: str) -> Any:
    return follow(cast(Any, Service(state, reason)), "job", Console(file=io.StringIO()))


def test_a_failed_job_raises_its_error_with_one_hint() -> None:
    with pytest.raises(TrainingError) as caught:
        followed(State.FAILED, "gloo: connection refused\n  at pair.cc\n  hint: open the port")
    assert str(caught.value) == "gloo: connection refused\n  at pair.cc\n  hint: open the port"
    with pytest.raises(TrainingError, match="read `monge logs job`"):
        followed(State.FAILED, "its driver died")


def test_a_cancelled_job_raises_and_a_finished_one_comes_back() -> None:
    with pytest.raises(TrainingError, match="cancelled: cancelled by ada"):
        followed(State.CANCELLED, "cancelled by ada")
    assert followed(State.SUCCEEDED, "").state is State.SUCCEEDED
