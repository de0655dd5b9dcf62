"""Terminal view of a job: states and stages as lines, training as a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from pipelines.errors import TrainingError
from services.jobs.client import Jobs
from services.jobs.documents import Event, Job, JobProgress
from services.jobs.states import State
from services.training.progress import format_metrics

_LONGEST_DETAILS = 70


def follow(jobs: Jobs, job: str, console: Console, on_event: Callable[[Event], None] | None = None) -> Job:
    """Show a job until it ends.

    Args:
        jobs: client of the job service.
        job: id of the job.
        console: console for output; if it is not a terminal, progress is printed as lines.
        on_event: called with each event.

    Raises:
        TrainingError: the job failed or was cancelled.
        ServiceError: the job does not exist, or the service is unreachable.
    """
    show(jobs.follow(job), console, on_event)
    ended = jobs.get(job)
    if ended.state is State.SUCCEEDED:
        return ended
    if ended.state is State.CANCELLED:
        raise TrainingError(f"job {job} was cancelled: {ended.reason}")
    message, _, hint = ended.reason.partition("\n  hint: ")
    raise TrainingError(message, hint=hint or f"read `monge logs {job}`")


def show(
    happening: Iterable[Event | JobProgress], console: Console, on_event: Callable[[Event], None] | None = None
) -> None:
    """Show events and progress of a job."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[details]}"),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("images", total=None, details="", visible=False)
        told: dict[str, float] = {}
        for one in happening:
            if isinstance(one, JobProgress):
                details = " · ".join(format_metrics(one.metrics))
                bars.update(
                    bar, total=one.total, completed=one.images, details=details[:_LONGEST_DETAILS], visible=True
                )
                if not console.is_terminal:
                    changed = {name: value for name, value in one.metrics.items() if told.get(name) != value}
                    line = " · ".join([f"  {one.images:,}/{one.total:,} images", *format_metrics(changed)])
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
                    told = one.metrics
                continue
            if one.kind != "error" and one.state is not State.FAILED:  # shown at the end, in full
                bars.console.print(f"  {one.text}", highlight=False, markup=False, soft_wrap=True)
            if on_event:
                on_event(one)
