"""Rows of a benchmark: measured in turns, printed as a table, stored as JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A comparison of Monge with a peer, or with a limit.

    Attributes:
        name: measured quantity.
        ours: result of Monge; lower is better.
        peer: result of the peer, in the same unit.
        peer_name: name of the peer; ``limit`` for an upper limit of ``ours``.
        unit: unit of both results.
        bar: required minimum of the ratio ``peer / ours``.
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
    """Measure the median milliseconds of each call, in turns, so that load on the machine affects all of them.

    Each call runs once as warm-up. ``time.process_time`` counts only the work of this process, on all its threads, page
    faults included; it is the clock for single-threaded rows on a shared machine. ``time.thread_time`` does not count
    work in other threads.
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
    """Format rows as aligned text."""
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
    """Format rows as a Markdown table."""
    lines = ["| | ours | peer | | unit | ratio | bar |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row.name} | {row.ours:.4g} | {row.peer:.4g} | {row.peer_name} | {row.unit} "
        f"| {'**' if row.met else ''}{row.ratio:.2f}{'**' if row.met else ''} | {row.bar:g} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a JSON list of objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n")
