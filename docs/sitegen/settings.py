"""The table of environment variables, from the settings of the services."""

from __future__ import annotations

import re

from services.settings import Settings
from sitegen.schemas import default, readable
from sitegen.tables import cell, code, table


def page() -> str:
    """Every environment variable with its type, default and description, as Markdown."""
    told = _attributes(Settings.__doc__ or "")
    rows = []
    for name, schema in Settings.model_json_schema()["properties"].items():
        optional = schema.get("default") is None
        type_ = readable(schema["anyOf"][0] if optional else schema, code)
        text = cell(told.get(name, ""))
        rows.append(
            (code(variable(name)), type_, "" if optional else default(schema, False), text[:1].upper() + text[1:])
        )
    return table(("variable", "type", "default", "description"), rows)


def variable(field: str) -> str:
    """The environment variable of a field."""
    return f"{Settings.model_config['env_prefix']}{field.upper()}"


def _attributes(docstring: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in docstring.partition("Attributes:")[2].splitlines():
        if named := re.match(r"\s{4,8}(\w+): (.*)", line):
            name = named[1]
            found[name] = named[2]
        elif line.strip() and found:
            found[name] += " " + line.strip()
    return found
