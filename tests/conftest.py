"""Property tests try the same examples in every run, and are given time: a failure is the change's, not the day's.

Where there is no card, Triton's kernels run in its interpreter, which has to be said before anybody imports it.
"""

import os
from pathlib import Path

from hypothesis import settings

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
