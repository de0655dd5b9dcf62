"""Events in the log of a job, read by the job service: one JSON object per line, after a marker.

Drivers and workers print these lines among others; Ray prefixes lines of workers with their names.
"""

from __future__ import annotations

import json
import math
import re
import time
from typing import Any

from pipelines.errors import MongeError

MARK = "@monge "

_RAY_PREFIX = re.compile(r"^(\x1b\[\d+m)*\([A-Za-z_]\w* pid=\d+(, ip=[\d.]+)?\)(\x1b\[\d+m)* ?")


def report_stage(text: str, *, trains: bool = False) -> None:
    """Report the current stage of the job.

    Args:
        text: description of the stage.
        trains: whether the stage is the training itself.
    """
    _report({"event": "stage", "text": text, "trains": trains})


def report_progress(images: int, total: int, metrics: dict[str, float]) -> None:
    """Report metrics at a number of images; metrics that are not finite are dropped: JSON has no such numbers."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    _report({"event": "progress", "images": images, "total": total, "metrics": finite})


def report_run(run_id: str, experiment_id: str) -> None:
    """Report the MLflow run of the job."""
    _report({"event": "run", "run_id": run_id, "experiment_id": experiment_id})


def report_error(error: MongeError, *, final: bool = True) -> None:
    """Report the failure of an attempt.

    Args:
        error: error that ended the attempt.
        final: whether another attempt would fail too.
    """
    _report({"event": "error", "message": str(error.args[0]), "hint": error.hint, "final": final})


def report_done(model: str | None) -> None:
    """Report the end of the job and the registered model."""
    _report({"event": "done", "model": model})


def read_event(line: str) -> dict[str, Any] | None:
    """Return the event in a log line; None if there is none."""
    mark, text = line.find(MARK), line.rstrip()
    if mark < 0:
        return None
    try:
        event = json.loads(text[mark + len(MARK) :])
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def format_line(line: str) -> list[str]:
    """Format a log line for users: events as text, other lines without Ray's prefix."""
    event = read_event(line)
    match event:
        case {"event": "stage", "text": str(text)}:
            return [f"[monge] {text}"]
        case {"event": "progress", "images": int(images), "total": int(total), "metrics": dict(metrics)}:
            return [f"[train] {images:,}/{total:,} images" + "".join(f" · {one}" for one in format_metrics(metrics))]
        case {"event": "error", "message": str(message), "hint": hint}:
            first, *others = (message + (f"\n  hint: {hint}" if hint else "")).splitlines() or [""]
            return [f"[error] {first}", *(other if other.startswith("  ") else f"  {other}" for other in others)]
        case {"event": "done", "model": model}:
            return [f"[monge] done: {model or 'no model registered'}"]
        case {"event": "run", "run_id": str(run_id)}:
            return [f"[monge] MLflow run {run_id}"]
    return [_RAY_PREFIX.sub("", line)]


def format_metrics(metrics: dict[str, float]) -> list[str]:
    """Format each metric as ``name value``."""
    return [f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}" for name, value in metrics.items()]


def _report(event: dict[str, Any]) -> None:
    print(MARK + json.dumps(event | {"at": round(time.time(), 3)}), flush=True)
