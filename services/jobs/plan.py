"""What can be known of a job before it is submitted: its data, its network, and what is wrong with them.

``python -m services.jobs.plan CACHE`` reads a spec from its input and writes the plan as JSON, or the error and exits
with 1. The job service runs it: it imports torch and decodes files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.data.catalogue import NAMES, classes_of
from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.data.source import fingerprint, open_source
from pipelines.errors import MongeError, SourceError
from pipelines.models.build import build_model
from pipelines.shape import ImageShape
from pipelines.spec import ClassificationSpec, JobSpec, parse_spec
from services.error_documents import write_error
from services.storage.objects import SCHEME

INDEXED = (".tar",)
"""Files that have to be read through before their images are known: that is the job's own work."""


@dataclass(frozen=True)
class WorkPlan:
    """What a job will work on, a line each.

    Attributes:
        data: the source and what was found there.
        model: the network and its size; None where the images are not known yet.
    """

    data: str
    model: str | None = None

    def lines(self) -> list[str]:
        """For a person."""
        return [f"data: {self.data}"] + [f"model: {self.model}"] * (self.model is not None)


def work_plan(spec: JobSpec, cache: Path) -> WorkPlan:
    """Look at a job's data on this machine and build its network on no device.

    Nothing is fetched; compressed arrays are unpacked into the cache, where the job finds them. What lies in S3, or
    has to be fetched or read through first, is left to the job.

    Args:
        spec: with the paths of this machine.
        cache: folder of downloads and of unpacked arrays.

    Raises:
        SourceError: there is no such source, it is not laid out as it should be, or has too few classes.
        ShardError: it is a damaged data set of shards.
        SpecError: the network cannot take such images.
    """
    source = spec.data.source
    if source.startswith(SCHEME):
        return WorkPlan(f"{source}, which the job reads")
    folder = Path(source).expanduser()
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return _planned(spec, manifest.images, manifest.image, manifest.classes, "sharded already")
    if source in NAMES:
        require_classes(spec, classes_of(spec.data))
        return WorkPlan(f"{source}, of the catalogue")
    if folder.suffix.lower() in INDEXED or (folder.is_dir() and any(folder.glob("*.tar"))):
        fingerprint(spec.data)  # whether it is there
        return WorkPlan(f"{source}, which the job reads through")
    found = open_source(spec.data, cache)
    return _planned(spec, len(found), found.image, found.classes)


def require_classes(spec: JobSpec, classes: Sequence[str]) -> None:
    """Refuse to train a classifier on one class.

    Raises:
        SourceError: there is only one.
    """
    if isinstance(spec.objective, ClassificationSpec) and len(classes) < 2:
        raise SourceError(
            f"{spec.data.source}: only one class, {classes[0]!r}: a classifier tells two or more apart",
            hint="give at least two, or train a generator",
        )


def _planned(spec: JobSpec, images: int, image: ImageShape, classes: Sequence[str], note: str = "") -> WorkPlan:
    require_classes(spec, classes)
    with torch.device("meta"):
        network = build_model(spec.model, image, spec.outputs(len(classes)))
    weights = sum(parameter.numel() for parameter in network.parameters())
    named = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
    count = "1 class" if len(classes) == 1 else f"{len(classes)} classes"
    parts = [f"{spec.data.source}: {images:,} images of {image.dims} in {count} ({named})", *([note] if note else [])]
    return WorkPlan(", ".join(parts), f"{spec.model.kind}, {weights:,} weights")


def main() -> int:
    """Plan the spec of standard input."""
    try:
        document = {"lines": work_plan(parse_spec(json.load(sys.stdin)), Path(sys.argv[1])).lines()}
    except MongeError as error:
        print(json.dumps(write_error(error)))
        return 1
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
