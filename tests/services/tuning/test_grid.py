"""Grids of specs: every combination, checked before any of them runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import SpecError
from services.tuning import grid
from services.tuning.grid import format_value, read_grid, told

MLP = Path(__file__).parents[3] / "configs" / "mlp.yaml"


def test_every_combination_the_last_field_first() -> None:
    found = read_grid(MLP, ["train.images=100"], ["model.hidden=[[4], [16, 8]]", "seed=[0, 1]"])
    assert found.fields == ("model.hidden", "seed")
    assert [dict(trial.values) for trial in found.trials] == [
        {"model.hidden": [4], "seed": 0},
        {"model.hidden": [4], "seed": 1},
        {"model.hidden": [16, 8], "seed": 0},
        {"model.hidden": [16, 8], "seed": 1},
    ]
    assert [trial.spec.seed for trial in found.trials] == [0, 1, 0, 1]
    assert {trial.spec.train.images for trial in found.trials} == {100} == {found.base.train.images}
    assert found.trials[2].spec.model.model_dump()["hidden"] == (16, 8)
    assert found.trials[0].setting == {"model.hidden": [4]}
    assert found.trials[3].label == "hidden=[16, 8], seed=1"


def test_values_are_those_of_the_resolved_spec() -> None:
    # YAML takes 1e-3 for a word; the spec makes it a number.
    found = read_grid(MLP, [], ["optimizer.learning_rate=[1e-3, 0.01]"])
    assert [trial.values["optimizer.learning_rate"] for trial in found.trials] == [0.001, 0.01]


def test_every_spec_is_resolved() -> None:
    found = read_grid(MLP, [], ["seed=[1, 2]"], lambda spec: spec.model_copy(update={"name": f"n{spec.seed}"}))
    assert [spec.name for spec in (found.base, *(trial.spec for trial in found.trials))] == ["n0", "n1", "n2"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "expected at least one field"),
        (["seed=[0]", "seed=[1]"], "each field once"),
        (["seed"], "not a list of values"),
        (["seed=3"], "not a list of values"),
        (["seed=[]"], "not a list of values"),
        (["seed=[0"], "the values are not YAML"),
        (["seed=[2024-01-01]"], "numbers, words and lists"),
        (["seed=[1, 1]"], "a value is listed twice"),
        (["seed=[0, -1]"], r"seed: .*greater than or equal to 0 \(received -1\)"),
        (["model.width=[1]"], "model.width: no such field"),
    ],
)
def test_grids_that_are_none(fields: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_grid(MLP, [], fields)


def test_a_grid_has_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "MOST_TRIALS", 3)
    with pytest.raises(SpecError, match="a grid of 4 runs exceeds the limit of 3"):
        read_grid(MLP, [], ["seed=[0, 1]", "train.batch=[8, 16]"])


def test_values_are_shown_briefly() -> None:
    assert [format_value(value) for value in ([4], [4, 2], 0.5, "adam", None, True)] == [
        "4", "[4, 2]", "0.5", "adam", "null", "true",
    ]  # fmt: skip
    assert told({"model.dropout": 0.5, "seed": 1}) == "dropout=0.5, seed=1"
