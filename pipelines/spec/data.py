"""The spec's section on data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipelines.spec.section import Section

CharacterSet = Literal["kittens", "people", "robots", "monsters", "heads"]

CHARACTERS = "characters"
"""The source that composes its images by a section of the spec."""


class CharactersSpec(Section):
    """Which cartoon characters the source ``characters`` composes."""

    sets: tuple[CharacterSet, ...] = Field(
        default=("kittens", "robots", "people"), min_length=1, description="the classes, in the order of their labels"
    )
    count: int = Field(default=20_000, ge=10, le=1_000_000, description="images in all, the sets in turn")
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="with the number of an image, and nothing else, it decides the parts"
    )

    @field_validator("sets")
    @classmethod
    def _differ(cls, sets: tuple[CharacterSet, ...]) -> tuple[CharacterSet, ...]:
        if len(set(sets)) < len(sets):
            raise ValueError("a set is named twice; name each once")
        return sets


class DataSpec(Section):
    """Where the images come from and how they are prepared."""

    source: str = Field(
        min_length=1,
        description="a catalogue name (cats-and-dogs, fashion-mnist, digits, points, characters); a folder of PNG, "
        "JPEG or WebP files, with one folder for each class or a labels.csv or .jsonl (file_name, label), below train/ "
        "and test/ where they are split; tar files in WebDataset layout; Parquet files with columns image and label; "
        "or an .npz file with arrays `images` and `labels`. All but the first also as s3://bucket/prefix",
    )
    size: int | None = Field(
        default=None,
        ge=4,
        le=1024,
        description="side of the square images, in pixels; the source's own by default",
    )
    channels: Literal[1, 3] = Field(default=1, description="1 for grey, 3 for colour")
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="fraction of each class that is held out, by content"
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="fraction of each class of the training split that is set apart by content: evaluations during "
        "training then use it, and the test split is used once, at the end",
    )
    drop_twins: bool = Field(
        default=False, description="keep the first of the images that have the same pixels, and list the others"
    )
    per_class: int | None = Field(
        default=None, ge=1, description="train on the first so many training images of each class alone"
    )
    max_bad_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="fraction of unreadable images above which the job refuses to start"
    )
    characters: CharactersSpec | None = Field(
        default=None, description="what the source `characters` composes; for that source alone, which has defaults"
    )

    @model_validator(mode="after")
    def _composes(self) -> DataSpec:
        if self.characters is not None and self.source != CHARACTERS:
            raise ValueError(
                f"characters is for source {CHARACTERS!r} alone, and source is {self.source!r}; leave the section out, "
                f"or set source to {CHARACTERS}"
            )
        return self
