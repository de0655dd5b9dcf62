"""Terminal view of a sweep: progress bar, table, figure and a file of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipelines.evaluation.figures import encode_png
from pipelines.spec import ClassificationSpec, JobSpec, RegressionSpec
from services.settings import Settings
from services.tracking.run import Run
from services.tuning.figure import against_field, over_images
from services.tuning.grid import Grid, format_value
from services.tuning.summary import Outcome, Setting, document, settings_of
from services.tuning.sweep import run_sweep


def show_sweep(
    grid: Grid, metrics: Sequence[str], curves: bool, out: Path, settings: Settings, console: Console
) -> list[Outcome]:
    """Run a sweep and show it; write the figure and the numbers to ``out``, to a ``.json`` next to it, and to MLflow.

    Args:
        grid: trials of the sweep.
        metrics: names of the metrics to compare; by default the main metric of the objective.
        curves: whether to plot metrics over images seen, instead of against the first swept field.
        out: PNG file to write.
        settings: addresses of the services.
        console: console for output.

    Raises:
        MongeError: the data is invalid, a service fails, all trials failed, or a metric does not exist.
    """
    metrics = tuple(metrics) or (_judged_by(grid.base),)
    columns = (TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    draw = over_images if curves else against_field

    def finish(run: Run, outcomes: list[Outcome]) -> None:
        found = settings_of(outcomes, metrics)
        title = f"{grid.base.name}, {len(outcomes)} runs"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode_png(draw(found, metrics, title)))
        numbers = out.with_suffix(".json")
        numbers.write_text(json.dumps(document(grid, outcomes, metrics), indent=2) + "\n")
        run.figure("sweep", out)
        run.figure("sweep", numbers)

    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {name: progress.add_task(name, total=None) for name in ("images sharded", "images trained on")}

        def on(name: str) -> Callable[[int, int], None]:
            return lambda done, total: progress.update(bars[name], completed=done, total=total)

        outcomes = run_sweep(grid, metrics, settings, finish, on("images sharded"), on("images trained on"))
    console.print(_table(settings_of(outcomes, metrics), metrics))
    for outcome in outcomes:
        if outcome.error is not None:
            console.print(f"  {outcome.trial.label} failed: {outcome.error}", style="red", markup=False)
    console.print(f"  wrote {out} and {out.with_suffix('.json')}", highlight=False, markup=False, soft_wrap=True)
    return outcomes


def _judged_by(spec: JobSpec) -> str:
    match spec.objective:
        case ClassificationSpec():
            return "test_accuracy"
        case RegressionSpec():
            return "test_error"
    return "test_transport_cost"


def _table(settings: Sequence[Setting], metrics: Sequence[str]) -> Table:
    table = Table(*settings[0].values, "runs", *(f"{name}, mean ± deviation (lowest … highest)" for name in metrics))
    for setting in settings:
        cells = [
            f"{np.mean(values):.4g} ± {np.std(values):.2g} ({min(values):.4g} … {max(values):.4g})" if values else "–"
            for values in setting.metrics.values()
        ]
        failed = f", {setting.failed} failed" if setting.failed else ""
        table.add_row(*map(format_value, setting.values.values()), f"{setting.runs}{failed}", *cells)
    return table
