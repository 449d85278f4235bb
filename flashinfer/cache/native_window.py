"""The windowed cache in C++: what it decides is what `cache.window.WindowCache` decides, its twin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashinfer.cache.heat import ADDED, HALF_LIFE, PILES_PER_HALVING, STEPS
from flashinfer.cache.policy import Change
from flashinfer.cache.slotmap import Index
from flashinfer.cache.window import check_preload, check_sizes
from flashinfer.config import Retention
from flashinfer.native._bookkeeping import Window


class NativeWindowCache:
    """A `Policy` (see `cache.policy`). Arguments and errors as those of `WindowCache`."""

    def __init__(self, records: int, slots: int, *, window: int, retention: Retention = "frequency") -> None:
        check_sizes(records, slots, window, retention)
        self.slots = slots
        self.slot_of: Index = np.full(records, -1, dtype=np.int64)
        self._core = Window(
            self.slot_of, slots, window, retention == "frequency", HALF_LIFE, PILES_PER_HALVING, STEPS, ADDED.tolist()
        )

    @property
    def used(self) -> int:
        """As `Policy.used`."""
        return self._core.used

    @property
    def window(self) -> list[Index]:
        """As `Policy.window`."""
        return self._core.active()

    @property
    def effective_window(self) -> int:
        """As `Policy.effective_window`."""
        return self._core.effective()

    def step(self, needed: Index, recent: Sequence[Index] = ()) -> Change:
        """As `Policy.step`."""
        return Change(*self._core.step(needed, recent))

    def preload(self, records: Index) -> Index:
        """As `Policy.preload`.

        Raises:
            ValueError: they do not fit, or one of them is resident.
        """
        check_preload(records, self.slot_of, self._core.free())
        return self._core.preload(records)
