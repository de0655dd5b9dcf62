"""The page of the command line, from the signatures of its commands."""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from services.cli import app
from sitegen.tables import cell, code, slug, summary, table

Commands = Iterator[tuple[str, Callable[..., Any]]]
_TYPES = {Path: "path", str: "str", int: "int", float: "float", bool: "flag"}


def page() -> str:
    """Every command with its usage, description, arguments and options, as Markdown."""
    overview = table(("command", "what it does"), (_row(name, function) for name, function in commands()))
    return "\n".join([overview, *(_section(name, function) for name, function in commands())])


def commands(group: typer.Typer = app, prefix: str = "monge") -> Commands:
    """Name and function of each command that is not hidden, subcommands included."""
    for command in group.registered_commands:
        if not command.hidden and command.callback is not None:
            name = command.name or command.callback.__name__.replace("_", "-")
            yield f"{prefix} {name}", command.callback
    for inner in group.registered_groups:
        if not inner.hidden and inner.typer_instance is not None:
            yield from commands(inner.typer_instance, f"{prefix} {inner.name}" if inner.name else prefix)


def _row(name: str, function: Callable[..., Any]) -> tuple[str, str]:
    return f"[`{name}`](#{slug(name)})", cell(summary(function.__doc__).split("\n\n")[0])


def _section(name: str, function: Callable[..., Any]) -> str:
    parameters = list(_parameters(function))
    arguments = [row for info, row in parameters if isinstance(info, ArgumentInfo)]
    options = [row for info, row in parameters if isinstance(info, OptionInfo)]
    usage = " ".join([name, *(["[OPTIONS]"] if options else []), *(row.usage for row in arguments)])
    parts = [f"## {name} {{#{slug(name)}}}", f"```text\n{usage}\n```", summary(function.__doc__)]
    for title, rows in (("argument", arguments), ("option", options)):
        if rows:
            parts.append(table((title, "type", "default", "description"), (row.cells for row in rows)))
    return "\n\n".join(parts) + "\n"


class _Parameter:
    """One argument or option.

    Args:
        info: what was declared with the annotation.
        name: of the parameter of the function.
        annotation: its type.
        value: its default; ``inspect.Parameter.empty`` if it is required.
    """

    def __init__(self, info: ArgumentInfo | OptionInfo, name: str, annotation: Any, value: Any) -> None:
        kind, multiple, choices = _kind(annotation)
        required = value is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            shown = (info.metavar or name).upper() + ("..." if multiple else "")
            self.usage = shown if required else f"[{shown}]"
        else:
            # Within Annotated, the first name takes the place of the default.
            given = [part for part in (info.default, *(info.param_decls or ())) if str(part).startswith("-")]
            dashed = name.replace("_", "-")
            names = given or [f"--{dashed}/--no-{dashed}" if kind == "flag" else f"--{dashed}"]
            shown = ", ".join(sorted(names, key=len, reverse=True))
            shown += f" {info.metavar}" if info.metavar else ""
        kinds = [choices or kind, *_range(info.min, info.max), *(["repeatable"] if multiple else [])]
        default = "required" if required else "" if value is None or value is False else code(str(value))
        self.cells = (code(shown), ", ".join(kinds), default, cell(info.help or ""))


def _parameters(function: Callable[..., Any]) -> Iterator[tuple[ArgumentInfo | OptionInfo, _Parameter]]:
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        annotation, *notes = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        info = next((note for note in notes if isinstance(note, ArgumentInfo | OptionInfo)), None) or OptionInfo()
        if not info.hidden:
            yield info, _Parameter(info, name, annotation, parameter.default)


def _kind(annotation: Any) -> tuple[str, bool, str]:
    """Name of a type, whether it can be given several times, and its choices."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(one for one in get_args(annotation) if one is not type(None))
    if multiple := get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return "str", multiple, "one of " + ", ".join(code(str(one)) for one in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "str", multiple, "one of " + ", ".join(code(str(one.value)) for one in annotation)
    return _TYPES.get(annotation, str(annotation)), multiple, ""


def _range(least: float | None, most: float | None) -> Iterator[str]:
    if least is not None:
        yield f"≥ {least}"
    if most is not None:
        yield f"≤ {most:,}"
