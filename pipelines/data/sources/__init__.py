"""The kinds of sources, one file for each; :mod:`pipelines.data.source` chooses among them."""
