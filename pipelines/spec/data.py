"""Section ``data`` of the spec."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipelines.spec.section import Section

CharacterSet = Literal["kittens", "people", "robots", "monsters", "heads"]

CHARACTERS = "characters"
"""Name of the source whose images are configured by a section of the spec."""


class CharactersSpec(Section):
    """Cartoon characters that the source ``characters`` composes."""

    sets: tuple[CharacterSet, ...] = Field(
        default=("kittens", "robots", "people"), min_length=1, description="classes, in the order of their labels"
    )
    count: int = Field(
        default=20_000, ge=10, le=1_000_000, description="total number of images; they cycle through the sets"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="seed; the parts of an image depend only on it and on the image's index"
    )

    @field_validator("sets")
    @classmethod
    def _differ(cls, sets: tuple[CharacterSet, ...]) -> tuple[CharacterSet, ...]:
        if len(set(sets)) < len(sets):
            raise ValueError("a set appears twice; list each set once")
        return sets


class DataSpec(Section):
    """Source and preparation of the images."""

    source: str = Field(
        min_length=1,
        description="a catalogue name (cats-and-dogs, fashion-mnist, digits, points, characters); a folder of PNG, "
        "JPEG or WebP files, with one folder per class or a labels.csv or .jsonl (file_name, label), under train/ "
        "and test/ if it is split; tar files in WebDataset layout; Parquet files with columns image and label; "
        "or an .npz file with arrays `images` and `labels`. All but catalogue names also as s3://bucket/prefix",
    )
    size: int | None = Field(
        default=None,
        ge=4,
        le=1024,
        description="side of the square images, in pixels; by default that of the source",
    )
    channels: Literal[1, 3] = Field(default=1, description="number of channels: 1 for grey, 3 for colour")
    test_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="fraction of each class that is held out for the test, selected by content hash",
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="fraction of each class of the training split that is held out for validation, selected by content "
        "hash: evaluations during training use it, and the test split is used once, at the end",
    )
    drop_twins: bool = Field(
        default=False, description="keep only the first of several images with the same pixels, and list the others"
    )
    per_class: int | None = Field(
        default=None, ge=1, description="number of training images per class; only the first ones are used"
    )
    max_bad_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="largest fraction of unreadable images with which the job starts"
    )
    characters: CharactersSpec | None = Field(
        default=None, description="settings of the source `characters`; only allowed for that source"
    )

    @model_validator(mode="after")
    def _composes(self) -> DataSpec:
        if self.characters is not None and self.source != CHARACTERS:
            raise ValueError(
                f"section characters requires source {CHARACTERS!r}, received source {self.source!r}; remove the "
                f"section, or set source to {CHARACTERS}"
            )
        return self
