"""The page of the job spec, from its JSON schema."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipelines.spec import JobSpec
from sitegen.schemas import Schema, default, description, fields, readable
from sitegen.tables import code, slug, summary, table


def page() -> str:
    """Every section of a job spec, with a table of its fields, as Markdown."""
    schema = JobSpec.model_json_schema()
    found = titles(schema)
    parts = ["## Fields of a job {#job}", _fields(schema, found)]
    named: set[str] = set()
    for name, title in found.items():
        root, _, kind = title.partition(": ")
        if kind and root not in named:
            named.add(root)
            parts.append(_choice(root, found))
        section = schema["$defs"][name]
        parts += [f"{'###' if kind else '##'} {title} {{#{slug(title)}}}", summary(section.get("description"))]
        parts.append(_fields(section, found))
    return "\n\n".join(parts)


def titles(schema: Schema) -> dict[str, str]:
    """Title of each section by the name of its schema.

    The title is the shortest path of a field that contains the section, as ``train``; or ``model: lenet`` for a section
    that its field ``kind`` selects. Sections are in the order of the fields of a job.
    """
    found: dict[str, str] = {}
    level: list[tuple[str, Schema]] = [("", schema)]
    while level:
        below = []
        for path, section in level:
            for field, inner, _ in fields(section):
                for name in _sections(inner):
                    if name not in found:
                        here = f"{path}.{field}" if path else field
                        kind = schema["$defs"][name]["properties"].get("kind", {}).get("const")
                        found[name] = here if kind is None else f"{here}: {kind}"
                        below.append((here, schema["$defs"][name]))
        level = below
    order = list(schema["properties"])
    return dict(sorted(found.items(), key=lambda item: order.index(re.split(r"[.:]", item[1])[0])))


def _choice(root: str, found: dict[str, str]) -> str:
    kinds = [title for title in found.values() if title.partition(": ")[0] == root]
    links = ", ".join(f"[`{title.partition(': ')[2]}`](#{slug(title)})" for title in kinds)
    return f"## {root} {{#{slug(root)}}}\n\nThe field `kind` is one of {links}."


def _fields(section: Schema, found: dict[str, str]) -> str:
    def link(name: str) -> str:
        return f"[{code(found[name])}](#{slug(found[name])})"

    def type_(schema: Schema) -> str:
        chosen = {found[name].partition(": ")[0] for name in _sections(schema) if ": " in found[name]}
        if len(chosen) == 1:
            root = chosen.pop()
            return f"[{code(root)}](#{slug(root)}), by `kind`"
        return readable(schema, link)

    rows = (
        (code(name), type_(field), default(field, required), description(field))
        for name, field, required in fields(section)
    )
    return table(("field", "type", "default", "description"), rows)


def _sections(schema: Any) -> Iterator[str]:
    if reference := schema.get("$ref"):
        yield reference.rsplit("/", 1)[1]
    for key in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(key, ()):
            yield from _sections(one)
    if "items" in schema:
        yield from _sections(schema["items"])
