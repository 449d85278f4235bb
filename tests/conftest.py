"""Property tests try the same examples in every run, and are given time: a failure is the change's, not the day's."""

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
