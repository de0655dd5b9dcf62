"""Local paths in a job spec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import SpecError
from pipelines.spec import FlowSpec, JobSpec, RecordedSpec
from services.storage.objects import SCHEME, split_address


def named_files(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Yield the field and the path of each file in a spec, except the images."""
    if isinstance(spec.objective, FlowSpec) and isinstance(spec.objective.coupling, RecordedSpec):
        yield "objective.coupling.file", spec.objective.coupling.file
    if spec.evaluation.weights is not None:
        yield "evaluation.weights", spec.evaluation.weights


def with_absolute_paths(spec: JobSpec) -> JobSpec:
    """Return the spec with absolute paths; the job runs in another working directory.

    Raises:
        SpecError: a file does not exist, or an S3 address is invalid or contains keys, which would appear in logs.
    """
    source = Path(spec.data.source).expanduser()
    if spec.data.source.startswith(SCHEME):
        split_address(spec.data.source)
    elif source.exists():
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"source": str(source.absolute())})})
    elif not source.is_absolute():
        _require_name(spec.data.source)
    if isinstance(spec.objective, FlowSpec) and isinstance(spec.objective.coupling, RecordedSpec):
        file = Path(spec.objective.coupling.file).expanduser().absolute()
        if not file.is_file():
            raise SpecError(f"objective.coupling.file: {file} does not exist", hint="create it with `monge couple`")
        coupling = spec.objective.coupling.model_copy(update={"file": str(file)})
        spec = spec.model_copy(update={"objective": spec.objective.model_copy(update={"coupling": coupling})})
    if spec.evaluation.weights is not None:
        file = Path(spec.evaluation.weights).expanduser().absolute()
        if not file.is_file():
            raise SpecError(f"evaluation.weights: {file} does not exist", hint="give a state dict of Inception-v3")
        spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"weights": str(file)})})
    return spec


def _require_name(source: str) -> None:
    from pipelines.data.catalogue import NAMES  # imports torch

    if source not in NAMES:
        raise SpecError(
            f"data.source: no file or folder {Path(source).expanduser().absolute()}",
            hint=f"use an existing path, an S3 address, or one of {', '.join(sorted(NAMES))}",
        )
