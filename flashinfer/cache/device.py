"""The cache of two tiers where arithmetic is: it decides what its twin decides, `cache.tiers.TieredCache`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashinfer.backend import Backend, Flags
from flashinfer.backend.bookkeeping import Bookkeeping, Counting, Tiers
from flashinfer.cache.heat import ADDED, HALF_LIFE, PILES_PER_HALVING, STEPS
from flashinfer.cache.policy import Change
from flashinfer.cache.slotmap import Index
from flashinfer.cache.tiers import MOST_PILES, MOST_RECORDS, check_tiers
from flashinfer.cache.window import check_preload
from flashinfer.config import TILE_NEURONS, Retention

COUNTING = Counting(HALF_LIFE, PILES_PER_HALVING, STEPS, ADDED, MOST_RECORDS, MOST_PILES)


@dataclass(frozen=True)
class Chosen:
    """A step of one token, of which the host knows only what changes.

    near: slots that are. change: as of `Policy.step`. neurons, records: how many are needed. far, far_slots: records
    that are needed and stay in far slots, and these slots.
    """

    near: int
    change: Change
    neurons: int
    records: int
    far: Index
    far_slots: Index

    @property
    def tiles(self) -> int:
        """Tiles that the neurons fill."""
        return -(-self.neurons // TILE_NEURONS)

    @property
    def elsewhere(self) -> Index:
        """The records that are needed and not near after the step."""
        new = self.change.insert_records[self.change.insert_slots < self.near]
        return np.concatenate((np.setdiff1d(self.change.misses, new, assume_unique=True), self.far))


class DeviceTieredCache:
    """A `Policy` (see `cache.policy`) whose state is where arithmetic is.

    Args:
        core: of the same sizes.
        near: slots that are near.
        slots: all of them.
    """

    def __init__(self, core: Bookkeeping, near: int, slots: int) -> None:
        self.core, self.near, self.slots = core, near, slots

    @property
    def slot_of(self) -> Index:
        """As `Policy.slot_of`; it is fetched each time."""
        return self.core.slots()

    @property
    def used(self) -> int:
        """As `Policy.used`."""
        return int(np.count_nonzero(self.slot_of >= 0))

    @property
    def window(self) -> list[Index]:
        """As `Policy.window`."""
        return self.core.window()

    @property
    def effective_window(self) -> int:
        """As `Policy.effective_window`."""
        return self.core.effective_window()

    def preload(self, records: Index) -> Index:
        """As `Policy.preload`.

        Raises:
            ValueError: they do not fit, or one of them is resident.
        """
        slot_of = self.slot_of
        check_preload(records, slot_of, self.slots - int(np.count_nonzero(slot_of >= 0)))
        return self.core.preload(records)

    def step(self, needed: Index, recent: Sequence[Index] = ()) -> Change:
        """As `Policy.step`."""
        return self._change(self.core.step(needed, recent))

    def choose(self, flags: Flags) -> Chosen:
        """A step of one token, `[1, neurons]`."""
        self.core.ask(flags)
        return self.answer()

    def answer(self) -> Chosen:
        """The step that the core was asked for."""
        rows, neurons, records = self.core.answer()
        record, before, after = rows.T
        stays = (before >= self.near) & (before == after)
        return Chosen(self.near, self._change(rows), neurons, records, record[stays], after[stays])

    def _change(self, rows: Index) -> Change:
        """Rows as `TieredCache` has them: rises before falls, new ones that are near before those that are far."""
        record, before, after = rows.T
        new, moved = (before < 0) & (after >= 0), (before >= 0) & (before != after)
        near = after < self.near
        inserts = np.concatenate((np.flatnonzero(new & near), np.flatnonzero(new & ~near)))
        moves = np.concatenate((np.flatnonzero(moved & near), np.flatnonzero(moved & ~near)))
        return Change(record[before < 0], record[inserts], after[inserts], before[moves], after[moves])


def device_cache(
    backend: Backend, records: int, near: int, far: int, *, window: int, retention: Retention, record_of: Index,
    within: Index,
) -> DeviceTieredCache | None:  # fmt: skip
    """The cache of two tiers where arithmetic is, if the backend can keep it there.

    record_of, within: see `backend.bookkeeping.Tiers`.

    Raises:
        ValueError: as `TieredCache`.
    """
    check_tiers(records, near, far, window, retention)
    tiers = Tiers(records, near, far, window, retention == "frequency", COUNTING, record_of, within)
    core = backend.bookkeeping(tiers)
    return None if core is None else DeviceTieredCache(core, near, near + far)
