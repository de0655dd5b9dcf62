"""One line of progress: written by rank 0, read by whoever follows the job's log."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"\[train\] ([\d,]+)/([\d,]+) images(.*)$")
_STAGE = re.compile(r"\[monge\] (.*)$")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        images: seen so far.
        total: to see.
        details: the latest numbers, as text.
    """

    images: int
    total: int
    details: str = ""

    def line(self) -> str:
        """The line for the log."""
        return f"[train] {self.images:,}/{self.total:,} images{self.details}"


def progress_line(images: int, total: int, metrics: dict[str, float]) -> str:
    """The line for a point of the curves."""
    shown = [f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.4g}" for name, value in metrics.items()]
    return Progress(images, total, "".join(f" · {text}" for text in shown)).line()


def stage_line(text: str) -> str:
    """The line that says what a job does now."""
    return f"[monge] {text}"


def read_progress(line: str) -> Progress | None:
    """The progress that a log line tells, if it tells any; Ray puts the worker's name before it."""
    if match := _LINE.search(line.rstrip()):
        images, total, details = match.groups()
        return Progress(int(images.replace(",", "")), int(total.replace(",", "")), details)
    return None


def read_stage(line: str) -> str | None:
    """The stage that a log line tells, if it tells one."""
    match = _STAGE.search(line.rstrip())
    return match.group(1) if match else None
