"""The generated parts of the documentation site: reference pages, links out of ``docs/``, equations.

The modules ``cli``, ``jobspec``, ``http`` and ``settings`` return Markdown and do not need MkDocs.
"""
