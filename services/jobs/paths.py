"""What a spec names on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import SpecError
from pipelines.spec import FlowSpec, JobSpec, RecordedSpec
from services.storage.objects import SCHEME, split_address


def named_files(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Each file that a spec names beside its images: the field, and the path."""
    if isinstance(spec.objective, FlowSpec) and isinstance(spec.objective.coupling, RecordedSpec):
        yield "objective.coupling.file", spec.objective.coupling.file
    if spec.evaluation.weights is not None:
        yield "evaluation.weights", spec.evaluation.weights


def with_absolute_paths(spec: JobSpec) -> JobSpec:
    """The spec with what it names on this machine's disk named absolutely: the job runs in another folder.

    Raises:
        SpecError: a file is missing, or an address in S3 is none or has keys in it, which every log would then tell.
    """
    source = Path(spec.data.source).expanduser()
    if spec.data.source.startswith(SCHEME):
        split_address(spec.data.source)
    elif source.exists():
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"source": str(source.absolute())})})
    if isinstance(spec.objective, FlowSpec) and isinstance(spec.objective.coupling, RecordedSpec):
        file = Path(spec.objective.coupling.file).expanduser().absolute()
        if not file.is_file():
            raise SpecError(f"objective.coupling.file: {file} does not exist", hint="write it with `monge couple`")
        coupling = spec.objective.coupling.model_copy(update={"file": str(file)})
        spec = spec.model_copy(update={"objective": spec.objective.model_copy(update={"coupling": coupling})})
    if spec.evaluation.weights is not None:
        file = Path(spec.evaluation.weights).expanduser().absolute()
        if not file.is_file():
            raise SpecError(f"evaluation.weights: {file} does not exist", hint="give a state dict of Inception-v3")
        spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"weights": str(file)})})
    return spec
