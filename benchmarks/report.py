"""Rows of a benchmark: measured in turns, printed as a table, kept as JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line: ours beside a peer, or beside a limit.

    Attributes:
        name: what is measured.
        ours: our figure, the lower the better.
        peer: the peer's, of the same unit.
        peer_name: who the peer is; ``limit`` for a figure that ours must stay under.
        unit: of both.
        bar: the least ratio ``peer / ours`` that we promise.
    """

    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    bar: float

    @property
    def ratio(self) -> float:
        return self.peer / self.ours

    @property
    def met(self) -> bool:
        return self.ratio >= self.bar

    def as_dict(self) -> dict[str, float | str | bool]:
        return asdict(self) | {"ratio": self.ratio, "met": self.met}


def in_turns(
    *calls: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, ...]:
    """Median milliseconds of each call, measured in turns so that a busy machine is busy for all of them.

    Each is called once beforehand. With ``time.process_time`` only this process's own work counts, on all its threads,
    page faults included: the measure for single-threaded rows on a shared machine. ``time.thread_time`` would miss what
    a call hands to a thread.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            started = clock()
            call()
            taken.append((clock() - started) * 1e3)
    return tuple(statistics.median(taken) for taken in times)


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""
    cells = [("", "ours", "peer", "", "unit", "ratio", "bar", "")]
    cells += [
        (
            row.name,
            f"{row.ours:.4g}",
            f"{row.peer:.4g}",
            row.peer_name,
            row.unit,
            f"{row.ratio:.2f}",
            f"{row.bar:g}",
            "met" if row.met else "NOT MET",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    left = {0, 3, 4, 7}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown."""
    lines = ["| | ours | peer | | unit | ratio | bar |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row.name} | {row.ours:.4g} | {row.peer:.4g} | {row.peer_name} | {row.unit} "
        f"| {'**' if row.met else ''}{row.ratio:.2f}{'**' if row.met else ''} | {row.bar:g} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Rows as a list of objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n")
