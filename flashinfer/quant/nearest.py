"""The nearest entry of a small table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def nearest(values: npt.NDArray[np.float32], table: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Index of the entry of an ascending `table` nearest to each value; of two that are as near, the lower one.

    The middles are taken in float32. A comparison for each entry is faster than a search while they are few.
    """
    found = np.zeros(values.shape, dtype=np.uint8)
    for middle in (table[:-1] + table[1:]) / np.float32(2):
        found += values > middle
    return found
