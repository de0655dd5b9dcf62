"""Public names are unique over pipelines and services, and the glossary lists existing names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAME_EVERYWHERE = {
    "build_app": "the ASGI application of a server",
    "couple": "the command, and what it calls",
    "down": "the command, and what it calls",
    "downgrade": "of a migration, as Alembic requires",
    "main": "the entry point of a command or process",
    "serve": "the loop of a server, and its command",
    "solve": "from a transport problem to its solution",
    "status": "the command, and what it calls",
    "up": "the command, and what it calls",
    "upgrade": "of a migration, as Alembic requires",
}
"""Functions that several modules define with the same meaning."""


def definitions() -> dict[str, list[str]]:
    """Return the modules that define each public class or function."""
    found = defaultdict(list)
    for path in sorted([*ROOT.glob("pipelines/**/*.py"), *ROOT.glob("services/**/*.py")]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
                found[node.name].append(str(path.relative_to(ROOT)))
    return found


def test_public_names_are_defined_once() -> None:
    repeated = {name: places for name, places in definitions().items() if len(places) > 1}
    assert {name: places for name, places in repeated.items() if name not in SAME_EVERYWHERE} == {}
    assert set(SAME_EVERYWHERE) <= set(repeated), "no longer defined twice"


def test_the_glossary_names_what_the_code_defines() -> None:
    defined = definitions()
    rows = re.findall(r"^\| ([\w -]+(?:, [\w ]+)*) \| .+ \| ((?:`\w+`(?:, )?)+) \|$", _glossary(), flags=re.MULTILINE)
    assert len(rows) > 40
    words = [word for row in rows for word in row[0].split(", ")]
    assert len(words) == len(set(words)), "a word is listed twice"
    for _, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert name in defined, name


def _glossary() -> str:
    return (ROOT / "docs/glossary.md").read_text()
