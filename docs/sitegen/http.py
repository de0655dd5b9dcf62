"""The pages of the HTTP services, from their OpenAPI documents."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

from fastapi import FastAPI

from services.settings import Settings
from sitegen.schemas import Schema, default, description, fields, readable, references
from sitegen.tables import cell, code, slug, summary, table

METHODS = ("get", "put", "post", "delete", "patch")


def transport() -> str:
    """The operations of the transport service, as Markdown."""
    from services.transport.app import build_app

    # The routes are described, never called: nothing stands behind them.
    return page(document(build_app(Mock())))


def jobs() -> str:
    """The operations of the job service, as Markdown."""
    from services.jobs.api import build_app

    return page(document(build_app(Mock())))


def endpoint() -> str:
    """The operations of the model endpoint, as Markdown."""
    from services.serving.app import create_app

    app = create_app(Settings.model_construct(mlflow_uri="http://localhost", serving_device="cpu"))
    app.state.endpoint.close()
    return page(document(app))


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an app."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return app.openapi()


def operations(api: Schema) -> Iterator[tuple[str, Schema]]:
    """``POST /v1/jobs`` and the like, with what the document says of it."""
    for path, methods in api["paths"].items():
        for method in METHODS:
            if method in methods:
                yield f"{method.upper()} {path}", methods[method]


def page(api: Schema) -> str:
    """Operations, then the schemas that they refer to, as Markdown."""
    found = list(operations(api))
    overview = table(
        ("operation", "summary"),
        ((f"[{code(name)}](#{slug(name)})", cell(operation.get("summary", ""))) for name, operation in found),
    )
    schemas = api.get("components", {}).get("schemas", {})
    shared = _shared([operation for _, operation in found])
    parts = [api["info"].get("description", ""), "## Operations", overview]
    if shared:
        rows = [_response(status, found[0][1]["responses"][status]) for status in sorted(shared)]
        parts += ["All operations can answer with these errors:", _answers(rows)]
    parts += [part for name, operation in found for part in _operation(name, operation, shared)]
    used = _used([operation for _, operation in found], schemas)
    if used:
        parts.append("## Schemas")
    for name in used:
        parts += [f"### {name} {{#{slug(name)}}}", summary(schemas[name].get("description")), _schema(schemas[name])]
    return "\n\n".join(part for part in parts if part)


def _used(operations: list[Schema], schemas: Schema) -> list[str]:
    """Names of the schemas that operations refer to, and that those refer to, sorted."""
    used: set[str] = set()
    new = set(references(operations))
    while new:
        used |= new
        new = {name for one in new for name in references(schemas.get(one, {}))} - used
    return sorted(used & set(schemas))


def _shared(operations: list[Schema]) -> set[str]:
    """Status codes of errors that all operations answer with, in the same words."""
    first, *others = (operation["responses"] for operation in operations)
    same = {status for status in first if all(other.get(status) == first[status] for other in others)}
    return {status for status in same if not status.startswith("2")}


def _operation(name: str, operation: Schema, shared: set[str]) -> Iterator[str]:
    yield f"### {name} {{#{slug(name)}}}"
    yield f"**{operation.get('summary', '')}.**"
    yield operation.get("description", "")
    if parameters := operation.get("parameters"):
        yield table(
            ("parameter", "in", "type", "default", "description"),
            (
                (code(one["name"]), one["in"], *_typed(one["schema"], one.get("required", False), one))
                for one in parameters
            ),
        )
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Request body, {code(kind)}:{_inline(body.get('schema', {}))}"
        if body.get("schema", {}).get("properties"):
            yield _schema(body["schema"])
    answers = sorted(item for item in operation["responses"].items() if item[0] not in shared)
    yield _answers([_response(*item) for item in answers])


def _answers(rows: list[tuple[str, str, str]]) -> str:
    """The table of status codes; without the column of bodies if there are none."""
    columns = 3 if any(body for *_, body in rows) else 2
    return table(("status", "description", "body")[:columns], [row[:columns] for row in rows])


def _response(status: str, response: Schema) -> tuple[str, str, str]:
    bodies = []
    for kind, body in response.get("content", {}).items():
        schema = body.get("schema") or body.get("itemSchema") or {}
        type_ = readable(schema, _link)
        bodies.append(code(kind) + (f": {type_}" if type_ not in ("any", "bytes") else ""))
    told = response.get("description", "").replace("Successful Response", "Success.")
    return status, cell(summary(told)), ", ".join(bodies)


def _typed(schema: Schema, required: bool, told: Schema) -> tuple[str, str, str]:
    return readable(schema, _link), default(schema, required), description(told) or description(schema)


def _inline(schema: Schema) -> str:
    type_ = "" if schema.get("properties") else readable(schema, _link)
    told = description(schema)
    return (f" {type_}" if type_ else "") + (f", {told}" if told and type_ else f" {told}" if told else "")


def _schema(schema: Schema) -> str:
    rows = [(code(name), *_typed(field, required, field)) for name, field, required in fields(schema)]
    if rows:
        return table(("field", "type", "default", "description"), rows)
    return f"Type: {readable(schema, _link)}."


def _link(name: str) -> str:
    return f"[{code(name)}](#{slug(name)})"
