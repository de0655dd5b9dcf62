"""Grid of specs: a job spec, and lists of values for some of its fields."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import SpecError
from pipelines.spec import JobSpec, load_spec

SEED = "seed"
"""Field whose values repeat a measurement: results are reported as mean and spread over them."""

MOST_TRIALS = 1_000


@dataclass(frozen=True)
class Trial:
    """A point of the grid.

    Attributes:
        values: values of the swept fields in the resolved spec, by dotted path.
        spec: resolved spec.
    """

    values: Mapping[str, Any]
    spec: JobSpec

    @property
    def setting(self) -> dict[str, Any]:
        """Values other than the seed: trials with equal settings are repetitions."""
        return {field: value for field, value in self.values.items() if field != SEED}

    @property
    def label(self) -> str:
        """Values as one line of text."""
        return told(self.values)


@dataclass(frozen=True)
class Grid:
    """All trials of a sweep.

    Attributes:
        base: spec without the values of the grid.
        fields: swept fields, in the given order.
        trials: trials; the last field varies fastest.
    """

    base: JobSpec
    fields: tuple[str, ...]
    trials: tuple[Trial, ...]


def read_grid(
    path: str | Path,
    overrides: Iterable[str],
    fields: Sequence[str],
    resolve: Callable[[JobSpec], JobSpec] = lambda spec: spec,
) -> Grid:
    """Return all combinations of the values of some fields; checks all specs first.

    Args:
        path: path of a job spec in YAML.
        overrides: ``dotted.path=value`` assignments for all trials.
        fields: ``dotted.path=[value, …]`` assignments in YAML.
        resolve: function applied to every spec, for example to make its paths absolute.

    Raises:
        SpecError: a field has no list of distinct values, or a combination is not a valid job spec.
    """
    overrides = list(overrides)
    base = resolve(load_spec(path, overrides))
    swept = dict(_values(field) for field in fields)
    if len(swept) < len(fields) or not fields:
        raise SpecError(f"--grid {' '.join(fields)!r}: expected at least one field, and each field once")
    count = math.prod(len(values) for values in swept.values())
    if count > MOST_TRIALS:
        raise SpecError(f"a grid of {count:,} runs exceeds the limit of {MOST_TRIALS:,}", hint="sweep fewer values")
    trials = []
    for values in itertools.product(*swept.values()):
        assignments = [f"{field}={json.dumps(value)}" for field, value in zip(swept, values, strict=True)]
        spec = resolve(load_spec(path, [*overrides, *assignments]))
        trials.append(Trial({field: _at(spec, field) for field in swept}, spec))
    return Grid(base, tuple(swept), tuple(trials))


def told(values: Mapping[str, Any]) -> str:
    """Return values of fields as one line of text, each with the last part of its path."""
    return ", ".join(f"{field.rpartition('.')[2]}={format_value(value)}" for field, value in values.items())


def format_value(value: Any) -> str:
    """Format a value for readers; a list of one number as the number."""
    if isinstance(value, list) and len(value) == 1:
        return format_value(value[0])
    return value if isinstance(value, str) else json.dumps(value)


def _values(field: str) -> tuple[str, list[Any]]:
    name, separator, text = field.partition("=")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"--grid {field!r}: the values are not YAML: {error}") from None
    if not separator or not isinstance(values, list) or not values:
        raise SpecError(f"--grid {field!r}: not a list of values", hint='use dotted.path=[a, b], such as "seed=[0, 1]"')
    try:
        told = [json.dumps(value) for value in values]
    except TypeError:
        raise SpecError(f"--grid {field!r}: expected numbers, words and lists of them") from None
    if len(set(told)) < len(told):
        raise SpecError(f"--grid {field!r}: a value is listed twice", hint="sweep over seeds to repeat a run")
    return name.strip(), values


def _at(spec: JobSpec, field: str) -> Any:
    value: Any = spec.model_dump(mode="json")
    for key in field.split("."):
        value = value[key]
    return value
