"""What a job reports in its log: one JSON object a line, behind a mark, read by the job service.

Drivers and workers print these lines among others; Ray puts a worker's name before them.
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
    """Report what the job does now.

    Args:
        text: in words.
        trains: whether it is the training itself.
    """
    _report({"event": "stage", "text": text, "trains": trains})


def report_progress(images: int, total: int, metrics: dict[str, float]) -> None:
    """Report a point of the curves; metrics that are not finite are left out, for JSON has no such numbers."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    _report({"event": "progress", "images": images, "total": total, "metrics": finite})


def report_run(run_id: str, experiment_id: str) -> None:
    """Report the MLflow run of the job."""
    _report({"event": "run", "run_id": run_id, "experiment_id": experiment_id})


def report_error(error: MongeError, *, final: bool = True) -> None:
    """Report why an attempt fails.

    Args:
        error: why.
        final: whether another attempt would meet it again.
    """
    _report({"event": "error", "message": str(error.args[0]), "hint": error.hint, "final": final})


def report_done(model: str | None) -> None:
    """Report the end of the job, and the model that it registered."""
    _report({"event": "done", "model": model})


def read_event(line: str) -> dict[str, Any] | None:
    """The report in a log line; None where there is none."""
    mark, text = line.find(MARK), line.rstrip()
    if mark < 0:
        return None
    try:
        event = json.loads(text[mark + len(MARK) :])
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def format_line(line: str) -> list[str]:
    """A log line for a person: reports in words, others without the name that Ray puts before them."""
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
            return [f"[monge] done: {model or 'there is no model to register'}"]
        case {"event": "run", "run_id": str(run_id)}:
            return [f"[monge] its MLflow run is {run_id}"]
    return [_RAY_PREFIX.sub("", line)]


def format_metrics(metrics: dict[str, float]) -> list[str]:
    """Each metric as ``name value``."""
    return [f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}" for name, value in metrics.items()]


def _report(event: dict[str, Any]) -> None:
    print(MARK + json.dumps(event | {"at": round(time.time(), 3)}), flush=True)
