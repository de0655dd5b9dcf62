"""Property tests state laws, not speeds: an example that a busy machine delays is no failure."""

from hypothesis import settings

settings.register_profile("laws", deadline=None)
settings.load_profile("laws")
