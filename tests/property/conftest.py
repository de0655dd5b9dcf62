"""Configuration of property tests: no deadline per example, because load on the machine may delay an example."""

from hypothesis import settings

settings.register_profile("laws", deadline=None)
settings.load_profile("laws")
