"""Output and validation before a job is submitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.catalogue import NAMES
from pipelines.errors import MongeError
from pipelines.spec import DataSpec, JobSpec, parse_spec
from services.jobs.plan import work_plan
from services.sharding.dataset import shard_dataset


def spec_of(source: str | Path, model: str = "lenet", kind: str = "classification") -> JobSpec:
    return parse_spec(
        {
            "name": "a",
            "data": {"source": str(source)},
            "model": {"kind": model},
            "objective": {"kind": kind},
            "train": {"images": 64},
        }
    )


def folder_of(path: Path, *classes: str, side: int = 28) -> Path:
    for name in classes:
        (path / name).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(np.full((side, side), index, np.uint8)).save(path / name / f"{index}.png")
    return path


def test_a_folder_is_counted_and_the_network_built(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "shapes", "disc", "square")
    assert work_plan(spec_of(folder), tmp_path / "cache").lines() == [
        f"data: {folder}: 6 images of (1, 28, 28) in 2 classes (disc, square)",
        "model: lenet, 61,026 weights",
    ]
    assert not (tmp_path / "cache").exists()


def test_shards_are_known_by_their_manifest(tmp_path: Path) -> None:
    shard_dataset(
        DataSpec(source=str(folder_of(tmp_path / "shapes", "disc", "square"))), tmp_path / "data", tmp_path, workers=0
    )
    data, model = work_plan(spec_of(tmp_path / "data"), tmp_path).lines()
    assert data.endswith("(disc, square), already sharded")
    assert model.startswith("model: lenet")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_catalogue_is_fetched(name: str, tmp_path: Path) -> None:
    assert work_plan(spec_of(name), tmp_path / "cache").lines() == [f"data: {name} from the catalogue"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("source", "told", "hint"),
    [
        ("nowhere", "nowhere: neither a data set of the catalogue nor", "give a path, or one of cats-and-dogs"),
        ("cats-and-dgos", "cats-and-dgos: neither", "did you mean cats-and-dogs?"),
        ("one", "found one class, 'disc'", "add images of another class"),
        ("small", "lenet", ""),
        ("empty", "empty", ""),
    ],
)
def test_what_is_wrong_is_told(
    source: str, told: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "one", "disc")
    folder_of(tmp_path / "small", "disc", "square", side=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MongeError) as raised:
        work_plan(spec_of(source), tmp_path / "cache")
    assert told in str(raised.value.args[0]).lower()
    assert hint in (raised.value.hint or "")


def test_what_the_job_has_to_read_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    assert work_plan(spec_of("s3://bucket/prefix"), tmp_path).model is None
    assert work_plan(spec_of(tmp_path / "a.tar"), tmp_path).model is None
    assert work_plan(spec_of(tmp_path), tmp_path).model is None
