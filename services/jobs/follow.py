"""Following a job on a terminal: its stages as lines, its training as a progress bar."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.errors import MongeError, TrainingError
from services.jobs.client import Job, Jobs
from services.training.progress import read_progress, read_stage

_RAY_PREFIX = re.compile(r"^(\x1b\[\d+m)*\([A-Za-z_]\w* pid=\d+(, ip=[\d.]+)?\)(\x1b\[\d+m)* ?")
_LONGEST_DETAILS = 70


def follow(jobs: Jobs, job: str, console: Console, on_stage: Callable[[str], None] | None = None) -> Job:
    """Show a job until it ends.

    Args:
        jobs: of the cluster.
        job: its id.
        console: where to show it; without a terminal, progress comes as plain lines.
        on_stage: told of each stage.

    Raises:
        TrainingError: the job failed or was cancelled.
        ServiceError: there is no such job.
    """
    problem = show(jobs.logs(job, follow=True), console, on_stage)
    ended = jobs.get(job)
    if ended.status == "SUCCEEDED":
        return ended
    if ended.status == "STOPPED":
        raise TrainingError(f"job {job} was cancelled")
    message, _, cure = (problem or f"job {job} failed: {ended.message}").partition("\n  cure: ")
    raise TrainingError(message, cure=cure or f"read `monge logs {job}`")


def error_lines(error: MongeError) -> str:
    """An error as :func:`show` reads it: each line after the first is indented."""
    first, *others = str(error).splitlines()
    return "\n".join([f"[error] {first}", *(line if line.startswith("  ") else f"  {line}" for line in others)])


def show(lines: Iterable[str], console: Console, on_stage: Callable[[str], None] | None = None) -> str | None:
    """Show the lines of a job's log as they come; returns the error that the job reported, if any."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[details]}"),
    )
    problem: list[str] = []
    latest = ""
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("images", total=None, details="", visible=False)
        for line in lines:
            line = plain(line)
            if (stage := read_stage(line)) is not None:
                if stage != latest:
                    bars.console.print(f"  {stage}", highlight=False, markup=False)
                latest = stage
                if on_stage:
                    on_stage(stage)
            elif (progress := read_progress(line)) is not None:
                details = progress.details.removeprefix(" · ")[:_LONGEST_DETAILS]
                bars.update(bar, total=progress.total, completed=progress.images, details=details, visible=True)
                if not console.is_terminal and line != latest:
                    console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
                latest = line
            elif line.startswith("[error] "):
                problem = [line.removeprefix("[error] ")]
            elif problem and line.startswith("  "):
                problem.append(line)
    return "\n".join(problem) or None


def plain(line: str) -> str:
    """A log line without the name that Ray puts before it."""
    return _RAY_PREFIX.sub("", line)
