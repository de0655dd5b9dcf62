"""Markdown tables, whose cells may contain any text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(``.+?``|`[^`]+`)")
_ESCAPES = {"|": "&#124;", "<": "&lt;", "$": "&#36;", "*": "\\*"}


def cell(text: str) -> str:
    """The text on one line, with its special characters escaped outside code spans."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(part if at % 2 else _escaped(part) for at, part in enumerate(parts))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown already, see :func:`cell`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def code(text: str) -> str:
    """The text as a code span; empty text stays empty."""
    return f"`{text}`" if text else ""


def slug(text: str) -> str:
    """An anchor for a heading."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def summary(docstring: str | None) -> str:
    """A docstring without its sections of arguments, attributes and errors."""
    kept = re.split(r"\n\s*\n\s*(?:Args|Attributes|Raises|Returns|Yields):", docstring or "")[0]
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", kept.strip()))


def _escaped(text: str) -> str:
    return "".join(_ESCAPES.get(letter, letter) for letter in text)
