"""The caches in C++: they decide what their twins decide, `cache.window.WindowCache` and `cache.tiers.TieredCache`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashinfer.cache.heat import ADDED, HALF_LIFE, PILES_PER_HALVING, STEPS
from flashinfer.cache.policy import Change
from flashinfer.cache.slotmap import Index
from flashinfer.cache.tiers import check_tiers
from flashinfer.cache.window import check_preload, check_sizes
from flashinfer.config import Retention
from flashinfer.native._bookkeeping import Tiers, Window

SCALE = HALF_LIFE, PILES_PER_HALVING, STEPS, ADDED.tolist()
"""How heat is counted, as the cores want it."""


class NativePolicy:
    """What every `Policy` (see `cache.policy`) in C++ does: it asks its core, which writes `slot_of`."""

    slots: int
    slot_of: Index
    _core: Window | Tiers

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


class NativeWindowCache(NativePolicy):
    """A `Policy` (see `cache.policy`). Arguments and errors as those of `WindowCache`."""

    def __init__(self, records: int, slots: int, *, window: int, retention: Retention = "frequency") -> None:
        check_sizes(records, slots, window, retention)
        self.slots = slots
        self.slot_of = np.full(records, -1, dtype=np.int64)
        self._core = Window(self.slot_of, slots, window, retention == "frequency", *SCALE)


class NativeTieredCache(NativePolicy):
    """A `Policy` (see `cache.policy`). Arguments and errors as those of `TieredCache`."""

    def __init__(self, records: int, near: int, far: int, *, window: int, retention: Retention = "frequency") -> None:
        check_tiers(records, near, far, window, retention)
        self.slots = near + far
        self.slot_of = np.full(records, -1, dtype=np.int64)
        self._core = Tiers(self.slot_of, near, far, window, retention == "frequency", *SCALE)
