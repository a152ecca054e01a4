"""Property tests without a deadline: on a busy machine a slow example is no failure."""

from hypothesis import settings

settings.register_profile("gr2", deadline=None)
settings.load_profile("gr2")
