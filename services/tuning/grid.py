"""A grid of specs: one job spec, and lists of values for some of its fields."""

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
"""The field whose values repeat a measurement: results are told as mean and spread over them."""

MOST_TRIALS = 1_000


@dataclass(frozen=True)
class Trial:
    """One point of the grid.

    Attributes:
        values: of the swept fields, by their dotted paths, as the resolved spec has them.
        spec: the whole spec.
    """

    values: Mapping[str, Any]
    spec: JobSpec

    @property
    def setting(self) -> dict[str, Any]:
        """The values but the seed: trials of one setting repeat each other."""
        return {field: value for field, value in self.values.items() if field != SEED}

    @property
    def label(self) -> str:
        """The values as one line."""
        return told(self.values)


@dataclass(frozen=True)
class Grid:
    """All points.

    Attributes:
        base: the spec without the grid's values.
        fields: what is swept, in the order given.
        trials: the last field changes first.
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
    """Every combination of the values of some fields; all are checked before any of them runs.

    Args:
        path: a job spec in YAML.
        overrides: ``dotted.path=value`` assignments that hold for all.
        fields: ``dotted.path=[value, …]``, in YAML.
        resolve: applied to every spec, as to make its paths absolute.

    Raises:
        SpecError: a field has no list of distinct values, or a combination is no job spec.
    """
    overrides = list(overrides)
    base = resolve(load_spec(path, overrides))
    swept = dict(_values(field) for field in fields)
    if len(swept) < len(fields) or not fields:
        raise SpecError(f"--grid {' '.join(fields)!r}: every field once, and at least one expected")
    count = math.prod(len(values) for values in swept.values())
    if count > MOST_TRIALS:
        raise SpecError(f"a grid of {count:,} runs is larger than {MOST_TRIALS:,}", hint="sweep fewer values")
    trials = []
    for values in itertools.product(*swept.values()):
        assignments = [f"{field}={json.dumps(value)}" for field, value in zip(swept, values, strict=True)]
        spec = resolve(load_spec(path, [*overrides, *assignments]))
        trials.append(Trial({field: _at(spec, field) for field in swept}, spec))
    return Grid(base, tuple(swept), tuple(trials))


def told(values: Mapping[str, Any]) -> str:
    """Values of fields as one line, each under the last word of its path."""
    return ", ".join(f"{field.rpartition('.')[2]}={format_value(value)}" for field, value in values.items())


def format_value(value: Any) -> str:
    """A value of a field as a reader writes it; a list of one number as the number."""
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
        raise SpecError(f"--grid {field!r}: not a list of values", hint='write dotted.path=[a, b], as in "seed=[0, 1]"')
    try:
        told = [json.dumps(value) for value in values]
    except TypeError:
        raise SpecError(f"--grid {field!r}: numbers, words and lists of them expected") from None
    if len(set(told)) < len(told):
        raise SpecError(f"--grid {field!r}: a value is listed twice", hint="sweep over seeds to repeat a run")
    return name.strip(), values


def _at(spec: JobSpec, field: str) -> Any:
    value: Any = spec.model_dump(mode="json")
    for key in field.split("."):
        value = value[key]
    return value
