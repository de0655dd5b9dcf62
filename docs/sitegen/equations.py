"""Equations as MathML, which browsers show without a script."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def to_mathml(page: str) -> str:
    """The HTML of a page with each equation that ``pymdownx.arithmatex`` marked converted from LaTeX to MathML."""
    page = _BLOCK.sub(lambda found: f'<div class="equation">{_mathml(found[1], "block")}</div>', page)
    return _INLINE.sub(lambda found: _mathml(found[1], "inline"), page)


def _mathml(latex: str, display: str) -> str:
    return convert(html.unescape(latex).strip(), display=display)
