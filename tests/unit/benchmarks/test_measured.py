"""The table of measurements: its rows, and the stored records of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measured import ROWS, Bench, ConfigRow, keep, record
from pipelines.spec import load_spec

ROOT = Path(__file__).parents[3]


def of(name: str, *values: float, extractor: str | None = None) -> dict[str, object]:
    return {
        "what": name, "by": [name], "figures": {"accuracy": list(values)},
        "quick": False, "seconds": 1.0, "extractor": extractor,
    }  # fmt: skip


def test_every_row_has_its_configs() -> None:
    for row in ROWS.values():
        for config in row.by:
            load_spec(ROOT / "configs" / f"{config}.yaml")


def test_a_record_has_a_figure_for_each_seed(tmp_path: Path) -> None:
    row = ConfigRow("nothing", ("lenet",), lambda bench, seed: {"twice": 2.0 * seed, "seed": seed}, seeds=(3, 4))
    found = record(row, Bench(False, tmp_path))
    assert found["figures"] == {"twice": [6.0, 8.0], "seed": [3, 4]}
    assert found["extractor"] is None
    assert record(row, Bench(True, tmp_path))["figures"] == {"twice": [6.0], "seed": [3]}


def test_rows_that_are_not_run_keep_what_they_found(tmp_path: Path) -> None:
    keep({"mlp": of("mlp", 0.5), "games": of("games", 40.0, extractor="reference sha256:1")}, tmp_path)
    text = keep({"perceptron": of("perceptron", 0.25, 0.375, 0.5), "mlp": of("mlp", 0.75)}, tmp_path)
    kept = json.loads((tmp_path / "measured.json").read_text())
    assert list(kept) == ["perceptron", "mlp", "games"]  # the order of the table
    assert kept["mlp"]["figures"]["accuracy"] == [0.75]
    assert (tmp_path / "measured.md").read_text() == text
    assert "| perceptron: accuracy | 0.375 (0.25–0.5) | `configs/perceptron.yaml` |" in text
    assert "| mlp: accuracy | 0.75 | `configs/mlp.yaml` |" in text
    assert "games: judged by reference sha256:1." in text
    assert "short runs" not in text


@pytest.mark.slow
def test_a_short_run_of_all_rows(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.measured", "--quick", "--out", "found"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found" / "measured.json").read_text())
    assert list(found) == list(ROWS)
    assert "short runs on small images" in done.stdout
    assert len({row["extractor"] for row in found.values()}) == 2  # the same for all that it judges, none for others
    assert len(list((tmp_path / ".monge" / "benchmarks").glob("*.png"))) == 14
