"""The twin of the windowed cache: it never keeps anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashinfer.cache.policy import Change
from flashinfer.cache.slotmap import EMPTY, Index


class AlwaysMiss:
    """A `Policy` without slots: the same selection as the real thing, every record read at each step."""

    def __init__(self, records: int) -> None:
        self.slots = 0
        self.used = 0
        self.slot_of: Index = np.full(records, -1, dtype=np.int64)

    @property
    def window(self) -> list[Index]:
        """Nothing is remembered."""
        return []

    @property
    def effective_window(self) -> int:
        """Always 0."""
        return 0

    def step(self, needed: Index, recent: Sequence[Index] = ()) -> Change:
        """Everything needed is a miss, and transient."""
        return Change(needed, EMPTY, EMPTY, EMPTY, EMPTY)

    def preload(self, records: Index) -> Index:
        """There is no free slot to take.

        Raises:
            ValueError: any record is given.
        """
        if records.size:
            raise ValueError(f"{len(records)} records do not fit 0 free slots")
        return EMPTY
