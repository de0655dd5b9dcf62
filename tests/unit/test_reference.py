"""The generated reference describes every command, field, setting and operation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import typer

from pipelines.spec import JobSpec
from services.cli import app
from services.jobs.api import build_app as jobs_app
from services.serving.app import create_app
from services.settings import Settings
from services.transport.app import build_app as transport_app
from sitegen import cli, http, jobspec, settings
from sitegen.links import rewrite
from sitegen.schemas import readable


def sections(page: str) -> dict[str, str]:
    """Return the text below each heading, by heading."""
    _, *parts = re.split(r"^#+ (.*?) \{#.*?\}$", page, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def visible(command: Any, path: str) -> list[tuple[str, Any]]:
    """Return path and command of each Typer command, without groups and hidden commands."""
    if command.hidden:
        return []
    if not hasattr(command, "commands"):
        return [(path, command)]
    return [found for name, one in command.commands.items() for found in visible(one, f"{path} {name}")]


def test_the_page_of_the_command_line_has_every_command_and_option() -> None:
    found = sections(cli.page())
    commands = visible(typer.main.get_command(app), "monge")
    assert {path for path, _ in commands} == set(found)
    for path, command in commands:
        told = " ".join(found[path].split())
        for parameter in command.params:
            names = [name for name in parameter.opts if name.startswith("-") and name != "--help"]
            assert all(re.search(rf"\| `[^`]*{name}\b", told) for name in names), (path, parameter.name)
            if getattr(parameter, "help", None) and names:
                assert parameter.help.split()[0] in told, (path, parameter.name)


def test_the_page_of_the_job_spec_has_every_field() -> None:
    schema = JobSpec.model_json_schema()
    titles = jobspec.titles(schema)
    found = sections(jobspec.page())
    assert set(titles) == set(schema["$defs"])
    assert len(set(titles.values())) == len(titles)
    for section, title in ((schema, "Fields of a job"), *((schema["$defs"][name], titles[name]) for name in titles)):
        assert set(re.findall(r"^\| `(\w+)` \|", found[title], flags=re.MULTILINE)) == set(section["properties"]), title


def test_the_page_of_settings_has_every_variable() -> None:
    found = re.findall(r"^\| `(MONGE_\w+)` \| .+ \| .* \| \S.* \|$", settings.page(), flags=re.MULTILINE)
    assert found == [settings.variable(name) for name in Settings.model_fields]


def endpoint_document() -> dict[str, Any]:
    built = create_app(Settings.model_construct(mlflow_uri="http://localhost", serving_device="cpu"))
    built.state.endpoint.close()
    return http.document(built)


@pytest.mark.parametrize(
    ("page", "document"),
    [
        (http.transport, lambda: http.document(transport_app(Mock()))),
        (http.jobs, lambda: http.document(jobs_app(Mock()))),
        (http.endpoint, endpoint_document),
    ],
    ids=["transport", "jobs", "endpoint"],
)
def test_the_page_of_a_service_has_every_operation(
    page: Callable[[], str], document: Callable[[], dict[str, Any]]
) -> None:
    written = page()
    found = sections(written)
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            told = found[f"{method.upper()} {path}"]
            for parameter in operation.get("parameters", ()):
                assert f"| `{parameter['name']}` | {parameter['in']} |" in told
            # Errors that all operations share are in one table.
            assert all(f"| {status} |" in told or f"| {status} |" in written for status in operation["responses"])
            assert re.search(r"^\| 2\d\d \|", told, flags=re.MULTILINE)
    for name in re.findall(r"\]\(#([\w-]+)\)", written):
        assert f"{{#{name}}}" in written, name


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "int ≥ 1"),
        (
            {"anyOf": [{"type": "integer", "minimum": 4, "maximum": 1024}, {"type": "null"}]},
            "int ≥ 4 and ≤ 1,024, or null",
        ),
        (
            {"type": "array", "items": {"type": "integer", "exclusiveMinimum": 0}, "minItems": 1},
            "list of (int > 0), at least 1 item",
        ),
        ({"enum": ["a", "b"]}, "one of `a`, `b`"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "map from str to str"),
    ],
)
def test_types_are_readable(schema: dict[str, Any], words: str) -> None:
    assert readable(schema, str) == words


def test_links_lead_to_pages_files_and_nowhere_for_folders() -> None:
    copied = []
    text = (
        "[a](../services/jobs/README.md#settings) [b](../configs/flow.yaml) [c](../configs) "
        "![d](images/mlflow-run.png) [e](https://example.org)\n```\n[f](../configs)\n```\n"
    )
    assert rewrite(text, "benchmarks.md", lambda source, target: copied.append((source, target))) == (
        "[a](services/jobs.md#settings) [b](files/configs/flow.yaml) c "
        "![d](images/mlflow-run.png) [e](https://example.org)\n```\n[f](../configs)\n```\n"
    )
    assert copied == [("configs/flow.yaml", "files/configs/flow.yaml")]
