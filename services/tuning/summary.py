"""What a sweep found: each setting's metrics, as mean and spread over its seeds."""

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
    """How a trial ended.

    Attributes:
        trial: which.
        metrics: the last value of every curve.
        curves: (images seen, value) points of the curves that were asked for.
        error: why it failed, None where it did not.
    """

    trial: Trial
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve]
    error: str | None = None


@dataclass(frozen=True)
class Setting:
    """The trials that differ in their seed alone.

    Attributes:
        values: of the other fields.
        metrics: by name, the values of all that finished.
        curves: by name, the curves of all that finished.
        failed: how many did not.
    """

    values: Mapping[str, Any]
    metrics: Mapping[str, list[float]]
    curves: Mapping[str, list[Curve]]
    failed: int

    @property
    def runs(self) -> int:
        """How many finished."""
        return max(map(len, self.metrics.values()))


def settings_of(outcomes: Sequence[Outcome], metrics: Sequence[str]) -> list[Setting]:
    """Outcomes by setting, in the order of the grid.

    Args:
        outcomes: of a whole sweep.
        metrics: the names of those that are wanted.

    Raises:
        TrainingError: every trial failed.
        SpecError: a metric is wanted that a trial does not have.
    """
    finished = [outcome for outcome in outcomes if outcome.error is None]
    if not finished:
        raise TrainingError(f"every run of the sweep failed; the first: {outcomes[0].error}")
    for outcome in finished:
        if missing := [name for name in metrics if name not in outcome.metrics]:
            raise SpecError(f"--metric {missing[0]!r}: a run has only {', '.join(sorted(outcome.metrics))}")
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
    """A sweep as JSON holds it: the spec, and for each setting the runs' metrics with their mean and deviation."""
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
    # Values may be lists, which no set takes.
    kept: list[Mapping[str, Any]] = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return kept
