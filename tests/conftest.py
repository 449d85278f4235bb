"""Property tests try the same examples in every run: a failure is the change's, not the day's."""

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")
