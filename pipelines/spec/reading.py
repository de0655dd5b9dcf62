"""Parsing of job specs from YAML, with errors that name the field."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.errors import SpecError
from pipelines.spec.data import DataSpec
from pipelines.spec.job import JobSpec


def load_spec(path: str | Path, overrides: Iterable[str] = ()) -> JobSpec:
    """Read a spec from YAML.

    Args:
        path: path of the file.
        overrides: ``dotted.path=value`` assignments with values in YAML, for example ``train.images=20000``.

    Raises:
        SpecError: the file is not a valid spec. The message has the path of each wrong field, the value received and
            the values expected.
    """
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file", hint="`monge init` copies example specs into configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date such as 2024-13-01
        raise SpecError(f"{path}: not YAML: {error}") from None
    if not isinstance(document, dict):
        raise SpecError(f"{path}: a mapping with name, data, model, objective and train expected")
    return parse_spec(apply_overrides(document, overrides), where=str(path))


def parse_spec(document: dict[str, Any], where: str = "spec") -> JobSpec:
    """Validate a document against the job spec.

    Raises:
        SpecError: the document is not valid; the message has one line per error.
    """
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError(
            f"{where}: invalid job spec:\n" + "\n".join(_fault(e, JobSpec) for e in error.errors())
        ) from None


def parse_data(document: dict[str, Any], overrides: Iterable[str] = ()) -> DataSpec:
    """Validate a document against the data section of a job spec.

    Raises:
        SpecError: the document is not valid; the message has one line per error.
    """
    for override in overrides:
        _assign(document, override)
    try:
        return DataSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError("not the data of a job:\n" + "\n".join(_fault(e, DataSpec) for e in error.errors())) from None


def apply_overrides(document: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Copy the document of a spec and apply assignments such as ``train.images=20000``.

    Raises:
        SpecError: an override is not an assignment.
    """
    document = copy.deepcopy(document)
    for override in overrides:
        _assign(document, override)
    return document


def json_schema() -> str:
    """The JSON schema of a job spec, for editors."""
    return json.dumps(JobSpec.model_json_schema(), indent=2) + "\n"


def _assign(document: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise SpecError(
            f"--set {override!r}: not an assignment", hint="write dotted.path=value, for example train.images=20000"
        )
    *parents, last = keys
    for key in parents:
        document = document.setdefault(key, {})
        if not isinstance(document, dict):
            raise SpecError(f"--set {override!r}: {key} is a value, not a section")
    try:
        document[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"--set {override!r}: the value is not YAML: {error}") from None


def _fault(error: Any, root: type[BaseModel]) -> str:
    location, fields = _place(error["loc"], root)
    path = ".".join(location) or "spec"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.partition(", unable to parse")[0]
    message = message.replace("a valid dictionary or object to extract fields from", "a mapping")
    received = error.get("input")
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        choices = re.findall(r"'([^']+)'", context["expected_tags"])
        guess = _guess(context["tag"], choices)
        return f"  {path}.kind: must be one of {', '.join(choices)} (received {context['tag']!r}){guess}"
    if error["type"] == "union_tag_not_found":
        return f"  {path}.kind: missing"
    if error["type"] == "extra_forbidden":
        return f"  {path}: no such field (received {received!r}){_guess(location[-1], fields)}"
    if error["type"] == "missing":
        return f"  {path}: missing"
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        return f"  {path}: {message} (received {received!r}){_guess(received, choices)}"
    if isinstance(received, dict | BaseModel):
        return f"  {path}: {message}"
    return f"  {path}: {message} (received {received!r})"


def _guess(word: Any, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), [choice for choice in choices if choice != word], 1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _place(location: Sequence[str | int], root: type[BaseModel]) -> tuple[list[str], list[str]]:
    """The path of an error as in the user's file, and the fields of the section that holds its last part.

    Pydantic inserts the selected member of a union after the field name; the user's file does not contain it.
    """
    path, fields, sections = [], [], [root]
    for part in location:
        chosen = [section for section in sections if part in _kinds(section)] if len(sections) > 1 else []
        if chosen:
            sections = chosen
            continue
        path.append(str(part))
        if isinstance(part, str):  # a place in a list stays in the sections of the list
            fields = [name for section in sections for name in section.model_fields]
            inner = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [section for field in inner for section in _sections(field.annotation)]
    return path, fields


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()
