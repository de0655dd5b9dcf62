"""Kinds of sources, one module each; :mod:`pipelines.data.source` selects one."""
