"""JSON schemas in words: the type, the limits and the default of a field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sitegen.tables import cell, code

Schema = Mapping[str, Any]
Link = Callable[[str], str]
"""Markdown for the name of a schema that is described elsewhere."""

_NAMES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "null", "object": "object"}
_FORMATS = {"binary": "bytes", "byte": "base64", "date-time": "time", "path": "path"}
_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
_SIZES = {
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}


def readable(schema: Schema, link: Link) -> str:
    """The type of a value, such as ``int ≥ 1``, as Markdown for a cell of a table."""
    if reference := schema.get("$ref"):
        return link(reference.rsplit("/", 1)[1])
    if "const" in schema:
        return code(_text(schema["const"]))
    if "enum" in schema:
        return "one of " + ", ".join(code(_text(value)) for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return _either(list(dict.fromkeys(readable(one, link) for one in schema[key])))
    if "allOf" in schema:
        return readable(schema["allOf"][0], link)
    return _plain(schema, link) + _limits(schema)


def default(schema: Schema, required: bool) -> str:
    """The default of a field, or that it is required."""
    if required:
        return "required"
    value = schema.get("default")
    if isinstance(value, dict) and value:
        return "defaults of the section"
    return code(_text(value)) if "default" in schema else ""


def description(schema: Schema) -> str:
    """The description of a field: its own, or the one of the type that it has unless it is null."""
    own = schema.get("description") or next(
        (one["description"] for one in schema.get("anyOf", ()) if one.get("description") and "$ref" not in one), ""
    )
    return cell(own)


def fields(schema: Schema) -> Iterator[tuple[str, Schema, bool]]:
    """Name, schema and whether it is required, of each field of an object."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        yield name, field, name in required


def references(schema: Any) -> Iterator[str]:
    """Names of the schemas that a schema refers to, in order."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rsplit("/", 1)[1]
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def _either(types: list[str]) -> str:
    return (", or " if any(" " in type_ for type_ in types) else " or ").join(types)


def _plain(schema: Schema, link: Link) -> str:
    kind = schema.get("type")
    if kind == "array":
        inside = schema.get("prefixItems")
        if inside:
            return "list of " + ", ".join(readable(one, link) for one in inside)
        items = readable(schema.get("items", {}), link)
        return f"list of ({items})" if re.search(" or |one of |[≥>≤<]", items) else f"list of {items}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"map from str to {readable(schema['additionalProperties'], link)}"
    if kind == "string" and "format" in schema:
        return _FORMATS.get(schema["format"], "str")
    return _NAMES.get(str(kind), "any")


def _limits(schema: Schema) -> str:
    bounds = " and ".join(words.format(_number(schema[key])) for key, words in _BOUNDS.items() if key in schema)
    sizes = [
        words.format(schema[key]).removesuffix("s" if schema[key] == 1 else "")
        for key, words in _SIZES.items()
        if key in schema
    ]
    pattern = [f"matches {code(schema['pattern'])}"] if "pattern" in schema else []
    return (f" {bounds}" if bounds else "") + "".join(f", {one}" for one in (*sizes, *pattern))


def _number(value: float) -> str:
    whole = int(value)
    power = whole.bit_length() - 1
    if whole == value and power >= 20 and whole == 2**power:
        return f"2^{power}"
    return f"{whole:,}" if whole == value else f"{value}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
