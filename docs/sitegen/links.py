"""Links of Markdown files of the repository, rewritten for the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

_SERVICES = ("jobs", "platform", "serving", "sharding", "storage", "tracking", "training", "transport", "tuning")

PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "pipelines/overview.md": "pipelines/README.md",
    "pipelines/transport.md": "pipelines/transport/README.md",
    **{f"services/{name}.md": f"services/{name}/README.md" for name in _SERVICES},
}
"""Pages of the site that are files outside ``docs/``."""

FILES = "files"
"""Folder of the site for linked files of the repository that are not pages."""

_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\]|!\[[^\[\]]*\]\([^()]*\))*)\]\(([^()\s]+)\)")
_EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:|#|/")


def rewrite(markdown: str, page: str, copy: Callable[[str, str], None]) -> str:
    """The Markdown with links that work on the site.

    Links to files of ``docs/`` and to files of :data:`PAGES` lead to their pages. Other linked files are copied into
    the site. A link to a folder becomes plain text.

    Args:
        markdown: source of the page.
        page: path of the page, relative to ``docs/``.
        copy: called with each file to copy: its path in the repository, and its path in the site.
    """

    def replaced(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        if not mark:
            text = _LINK.sub(replaced, text)
        if _EXTERNAL.match(target):
            return f"{mark}[{text}]({target})"
        path, hash_, anchor = target.partition("#")
        address = _address(path, page, copy)
        return text if address is None else f"{mark}[{text}]({address}{hash_}{anchor})"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(replaced, markdown[end:])])


def _address(path: str, page: str, copy: Callable[[str, str], None]) -> str | None:
    """The path relative to the page; None for a folder."""
    source = PAGES.get(page, f"docs/{page}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if (ROOT / target).is_dir():
        readme = f"{target}/README.md"
        if readme not in PAGES.values():
            return None
        target = readme
    if target == "README.md":
        found = "index.md"
    elif target in PAGES.values():
        found = next(name for name, file in PAGES.items() if file == target)
    elif target.startswith("docs/"):
        found = target.removeprefix("docs/")
    elif not (ROOT / target).exists():
        return path  # MkDocs reports it
    else:
        found = f"{FILES}/{target}"
        if target.endswith(".md"):
            found += ".txt"  # else MkDocs would take it for a page
        copy(target, found)
    return posixpath.relpath(found, posixpath.dirname(page))
