"""The checkpoint of another job from which a job starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import CheckpointError, SpecError
from services.settings import Settings
from services.training.origin import FILES, Origin, complete_checkpoints, find_origin

SETTINGS = Settings()


@pytest.mark.parametrize("text", ["a-20261127-093604-ab12", "a-20261127-093604-ab12@10240", "a@0"])
def test_what_is_written_is_read(text: str) -> None:
    assert str(Origin.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "@1", "a@", "a@b", "a@1@2", "..", ".staging", "a/b", "../a", "a b", "a\n", "a@-1", "a@²"]
)
def test_what_names_no_job_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="is neither JOB nor JOB@IMAGES"):
        Origin.parse(text)


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    names = "images-000000000064 images-000000000064-10 images-000000000064-2 images-000000000032 images-1234567890123"
    for name in (*names.split(), "images-64", "checkpoint-1"):
        (tmp_path / "a" / name).mkdir(parents=True)
        for file in FILES:
            (tmp_path / "a" / name / file).touch()
    (tmp_path / "a" / "images-000000000096").touch()
    return tmp_path


def test_checkpoints_are_sorted_by_images_and_then_by_number(jobs: Path) -> None:
    assert complete_checkpoints(str(jobs), "a", SETTINGS) == [
        "images-000000000032",
        "images-000000000064",
        "images-000000000064-2",
        "images-000000000064-10",
        "images-1234567890123",
    ]
    assert complete_checkpoints(str(jobs), "b", SETTINGS) == []


@pytest.mark.parametrize(
    ("images", "name"), [(None, "images-1234567890123"), (64, "images-000000000064-10"), (32, "images-000000000032")]
)
def test_the_latest_is_found_or_the_last_of_so_many_images(jobs: Path, images: int | None, name: str) -> None:
    origin, found = find_origin(str(jobs), Origin("a", images), SETTINGS)
    assert found == name
    assert origin == Origin("a", images or 1_234_567_890_123)


def test_what_is_kept_is_listed(jobs: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a@96 does not exist; .* at 32, 64, 1234567890123 images") as error:
        find_origin(str(jobs), Origin("a", 96), SETTINGS)
    assert error.value.hint == "use one of them, such as a@1234567890123"
    with pytest.raises(CheckpointError, match="b has no checkpoint in"):
        find_origin(str(jobs), Origin("b"), SETTINGS)
