"""Checks of a job before it is submitted: its data and its network.

``python -m services.jobs.plan CACHE`` reads a spec from standard input and writes the plan as JSON, or writes the
error and exits with status 1. The job service runs it in a separate process: it imports torch and decodes files.
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
"""Suffixes of files that must be read completely to list their images; the job does that itself."""


@dataclass(frozen=True)
class WorkPlan:
    """Summary of the data and the network of a job.

    Attributes:
        data: source, and the number, size and classes of its images.
        model: network and its size; None if the images are not known yet.
    """

    data: str
    model: str | None = None

    def lines(self) -> list[str]:
        """Return the summary, one line for each part."""
        return [f"data: {self.data}"] + [f"model: {self.model}"] * (self.model is not None)


def work_plan(spec: JobSpec, cache: Path) -> WorkPlan:
    """Read the data of a job on this machine and build its network on the meta device.

    Nothing is downloaded; compressed arrays are unpacked into the cache, where the job reuses them. Data that is in
    S3, or that must be downloaded or read completely first, is left to the job.

    Args:
        spec: job spec, with paths of this machine.
        cache: folder for downloads and of unpacked arrays.

    Raises:
        SourceError: the source does not exist, has an invalid layout, or has too few classes.
        ShardError: the sharded data set is damaged.
        SpecError: the network does not accept images of this size.
    """
    source = spec.data.source
    if source.startswith(SCHEME):
        return WorkPlan(f"{source}, read by the job")
    folder = Path(source).expanduser()
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return _planned(spec, manifest.images, manifest.image, manifest.classes, "already sharded")
    if source in NAMES:
        require_classes(spec, classes_of(spec.data))
        return WorkPlan(f"{source} from the catalogue")
    if folder.suffix.lower() in INDEXED or (folder.is_dir() and any(folder.glob("*.tar"))):
        fingerprint(spec.data)  # raises if it does not exist
        return WorkPlan(f"{source}, read by the job")
    found = open_source(spec.data, cache)
    return _planned(spec, len(found), found.image, found.classes)


def require_classes(spec: JobSpec, classes: Sequence[str]) -> None:
    """Raise if a classifier would be trained on one class.

    Raises:
        SourceError: there is only one.
    """
    if isinstance(spec.objective, ClassificationSpec) and len(classes) < 2:
        raise SourceError(
            f"{spec.data.source}: found one class, {classes[0]!r}; a classifier needs at least two",
            hint="add images of another class, or train a generator",
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
    """Plan the spec from standard input."""
    try:
        document = {"lines": work_plan(parse_spec(json.load(sys.stdin)), Path(sys.argv[1])).lines()}
    except MongeError as error:
        print(json.dumps(write_error(error)))
        return 1
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
