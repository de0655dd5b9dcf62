"""Summary of a sweep as numbers and as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import SpecError, TrainingError
from services.tuning import figure
from services.tuning.figure import against_field, over_images
from services.tuning.grid import Grid, read_grid
from services.tuning.summary import Outcome, document, settings_of

MLP = Path(__file__).parents[3] / "configs" / "mlp.yaml"
WIDTHS = (4, 16, 64)


@pytest.fixture
def grid() -> Grid:
    return read_grid(MLP, [], ["model.hidden=[[4], [16], [64]]", "seed=[0, 1]"])


def outcomes_of(grid: Grid) -> list[Outcome]:
    """Create outcomes with error 1 / width, ten percent higher for the second seed; the last trial failed."""
    found = []
    for trial in grid.trials:
        error = (1 + 0.1 * trial.values["seed"]) / trial.values["model.hidden"][0]
        curve = [(100, 1.0), (200, error)]
        found.append(Outcome(trial, {"test_error": error, "loss": 1.0}, {"test_error": curve}))
    return [*found[:-1], Outcome(grid.trials[-1], {}, {}, "weights burst")]


def test_trials_of_one_setting_are_its_repetitions(grid: Grid) -> None:
    settings = settings_of(outcomes_of(grid), ["test_error"])
    assert [setting.values for setting in settings] == [{"model.hidden": [width]} for width in WIDTHS]
    assert [setting.metrics["test_error"] for setting in settings] == [
        pytest.approx([0.25, 0.275]), pytest.approx([0.0625, 0.06875]), pytest.approx([1 / 64]),
    ]  # fmt: skip
    assert [(setting.runs, setting.failed) for setting in settings] == [(2, 0), (2, 0), (1, 1)]


def test_the_document_is_json_and_complete(grid: Grid) -> None:
    found = json.loads(json.dumps(document(grid, outcomes_of(grid), ["test_error"])))
    assert found["fields"] == ["model.hidden", "seed"]
    assert found["failures"] == {"hidden=64, seed=1": "weights burst"}
    assert found["settings"][0]["model.hidden"] == [4]
    assert found["settings"][0]["test_error"] == {
        "mean": pytest.approx(0.2625), "deviation": pytest.approx(0.0125), "runs": pytest.approx([0.25, 0.275]),
    }  # fmt: skip
    assert found["settings"][2]["failed"] == 1
    assert found["spec"]["name"] == grid.base.name


def test_when_all_failed_or_no_run_has_the_metric(grid: Grid) -> None:
    with pytest.raises(SpecError, match="--metric 'fid': available metrics: loss, test_error"):
        settings_of(outcomes_of(grid), ["fid"])
    with pytest.raises(TrainingError, match="all runs of the sweep failed; the first: out of luck"):
        settings_of([Outcome(trial, {}, {}, "out of luck") for trial in grid.trials], ["test_error"])


Drawn = dict[str, Any]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Record the contents of the axes of the last picture."""
    found: Drawn = {}
    plain = figure._picture

    def keep(draw: Callable, title: str, metrics: Sequence[str]) -> np.ndarray:
        def draw_and_look(axis: Any) -> None:
            draw(axis)
            found.update(
                scales=(axis.get_xscale(), axis.get_yscale()),
                lines={line.get_label(): np.asarray(line.get_xydata()) for line in axis.get_lines()},
                ticks=[label.get_text() for label in axis.get_xticklabels()],
            )

        return plain(draw_and_look, title, metrics)

    monkeypatch.setattr(figure, "_picture", keep)
    return found


def test_a_metric_against_a_number_is_drawn_on_logarithmic_axes(grid: Grid, drawn: Drawn) -> None:
    picture = against_field(settings_of(outcomes_of(grid), ["test_error"]), ["test_error"], "errors")
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert drawn["scales"] == ("log", "log")
    assert drawn["lines"]["test error"] == pytest.approx(np.array([[4, 0.2625], [16, 0.065625], [64, 1 / 64]]))


def test_numbers_near_each_other_and_words_are_not(drawn: Drawn) -> None:
    for fields, ticks in (
        (["model.dropout=[0, 0.5]"], ["0", "0.5"]),
        (["model.hidden=[[4], [4, 2]]"], ["4", "[4, 2]"]),
    ):
        grid = read_grid(MLP, [], [*fields, "objective.flip=[true, false]"])
        outcomes = [Outcome(trial, {"a": 0.8 + 0.01 * place}, {}) for place, trial in enumerate(grid.trials)]
        against_field(settings_of(outcomes, ["a"]), ["a"], "")
        assert drawn["scales"] == ("linear", "linear")
        assert drawn["ticks"] == ticks
        assert drawn["lines"].keys() == {"a · flip=true", "a · flip=false"}
        assert drawn["lines"]["a · flip=false"][:, 1] == pytest.approx([0.81, 0.83])


def test_seeds_alone_are_one_mark(drawn: Drawn) -> None:
    grid = read_grid(MLP, [], ["seed=[3, 4]"])
    outcomes = [Outcome(trial, {"a": value}, {}) for trial, value in zip(grid.trials, (0.2, 0.4), strict=True)]
    against_field(settings_of(outcomes, ["a"]), ["a"], "")
    assert drawn["lines"]["a"][:, 1] == pytest.approx([0.3])


def test_curves_are_drawn_over_images(grid: Grid, drawn: Drawn) -> None:
    over_images(settings_of(outcomes_of(grid), ["test_error"]), ["test_error"], "errors")
    assert drawn["lines"]["hidden=4 · test error"] == pytest.approx(np.array([[100, 1.0], [200, 0.2625]]))
    assert len(drawn["lines"]) == 3
