"""Hooks of MkDocs: generated reference pages, pages from READMEs, links out of ``docs/``, equations."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
for folder in (ROOT, ROOT / "docs"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from sitegen import cli, http, jobspec, settings  # noqa: E402
from sitegen.equations import to_mathml  # noqa: E402
from sitegen.links import PAGES, rewrite  # noqa: E402

GENERATORS = {
    "cli": cli.page,
    "job-spec": jobspec.page,
    "settings": settings.page,
    "http-transport": http.transport,
    "http-endpoint": http.endpoint,
    "http-jobs": http.jobs,
}
"""What a comment such as ``<!-- generated: cli -->`` stands for."""

_GENERATED = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>(~?)([\w.]+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files outside ``docs/``."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert generated parts, and rewrite links."""

    def copy(source: str, target: str) -> None:
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))

    markdown = rewrite(markdown, page.file.src_uri, copy)
    return _GENERATED.sub(lambda found: GENERATORS[found[1]](), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert equations to MathML, and roles of docstrings to links."""
    return _ROLE.sub(_linked, to_mathml(html))


def _linked(role: re.Match[str]) -> str:
    short, name = role.groups()
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'
