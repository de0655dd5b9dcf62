"""Results of a sweep: metrics of each setting, as mean and spread over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.errors import SpecError, TrainingError
from services.tuning.grid import Grid, Trial

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Outcome:
    """Result of a trial.

    Attributes:
        trial: trial.
        metrics: last value of each metric.
        curves: (images seen, value) points of the requested metrics.
        error: reason of a failure; None if it succeeded.
    """

    trial: Trial
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve]
    error: str | None = None


@dataclass(frozen=True)
class Setting:
    """Trials that differ only in their seed.

    Attributes:
        values: values of the other fields.
        metrics: values of the finished trials, by metric.
        curves: curves of the finished trials, by metric.
        failed: number of failed trials.
    """

    values: Mapping[str, Any]
    metrics: Mapping[str, list[float]]
    curves: Mapping[str, list[Curve]]
    failed: int

    @property
    def runs(self) -> int:
        """Number of finished trials."""
        return max(map(len, self.metrics.values()))


def settings_of(outcomes: Sequence[Outcome], metrics: Sequence[str]) -> list[Setting]:
    """Group outcomes by setting, in the order of the grid.

    Args:
        outcomes: outcomes of a whole sweep.
        metrics: names of the requested metrics.

    Raises:
        TrainingError: all trials failed.
        SpecError: a trial lacks a requested metric.
    """
    finished = [outcome for outcome in outcomes if outcome.error is None]
    if not finished:
        raise TrainingError(f"all runs of the sweep failed; the first: {outcomes[0].error}")
    for outcome in finished:
        if missing := [name for name in metrics if name not in outcome.metrics]:
            raise SpecError(f"--metric {missing[0]!r}: available metrics: {', '.join(sorted(outcome.metrics))}")
    found = []
    for values in _distinct([outcome.trial.setting for outcome in outcomes]):
        own = [outcome for outcome in finished if outcome.trial.setting == values]
        failed = sum(outcome.error is not None and outcome.trial.setting == values for outcome in outcomes)
        found.append(
            Setting(
                values,
                {name: [outcome.metrics[name] for outcome in own] for name in metrics},
                {name: [outcome.curves.get(name, []) for outcome in own] for name in metrics},
                failed,
            )
        )
    return found


def document(grid: Grid, outcomes: Sequence[Outcome], metrics: Sequence[str]) -> dict[str, Any]:
    """Return a sweep as JSON data: the spec, and for each setting the metrics with mean and deviation."""
    rows = []
    for setting in settings_of(outcomes, metrics):
        numbers = {
            name: {"mean": float(np.mean(values)), "deviation": float(np.std(values)), "runs": values}
            for name, values in setting.metrics.items()
            if values
        }
        rows.append({**setting.values, **numbers, "failed": setting.failed})
    failures = {outcome.trial.label: outcome.error for outcome in outcomes if outcome.error is not None}
    return {
        "fields": list(grid.fields),
        "settings": rows,
        "failures": failures,
        "spec": grid.base.model_dump(mode="json"),
    }


def _distinct(values: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    # Values may be lists, which are not hashable.
    kept: list[Mapping[str, Any]] = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return kept
