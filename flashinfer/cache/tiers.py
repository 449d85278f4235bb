"""One windowed cache over two tiers of slots: few near ones, where arithmetic is, and more that are far.

A record is in one place: a near slot, a far slot, or none. It rises only when it is needed, and falls when what rose
has the better claim to its slot; what falls is written to a far slot, not read again.

Everything is decided by comparing one number per record (`claims`), so the same operations on arrays of any device
decide the same: sums, comparisons, and the largest k of distinct numbers. Work is in proportion to a layer's records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from flashinfer.cache.heat import PILES_PER_HALVING, Heat
from flashinfer.cache.policy import Change
from flashinfer.cache.slotmap import EMPTY, Index
from flashinfer.cache.window import check_preload, check_sizes
from flashinfer.config import Retention

MOST_RECORDS, MOST_PILES = 1 << 22, 1 << 26
"""Of a layer, and of what is told apart by use: a claim has so many bits for them, and two for the tier."""
Mask = npt.NDArray[np.bool_]


def claims(slot_of: Index, near: int, age: Index, pile: Index) -> Index:
    """A number for each record; of two records the one with the larger has the better claim to a place.

    Compared are in this order: age, pile, whether it is in a near slot, then a far one; of equals the first record.

    Args:
        slot_of: slot of each record, below `near` a near one, -1 none.
        near: how many slots are near.
        age: 0 and up, the larger the newer is its last use.
        pile: of `Heat.pile`, the larger the more it is used; -1 and below of who never was.
    """
    tier = (slot_of >= 0).astype(np.int64) + ((slot_of >= 0) & (slot_of < near))
    warm = np.clip(pile + 1, 0, MOST_PILES - 1)
    first = MOST_RECORDS - 1 - np.arange(len(slot_of))
    found: Index = ((age * MOST_PILES + warm) * 4 + tier) * MOST_RECORDS + first
    return found


def best(claim: Index, among: Mask, count: int) -> Index:
    """The records with the `count` best claims among some; sorted."""
    some = np.flatnonzero(among)
    if len(some) <= count:
        return some
    return np.sort(some[np.argpartition(-claim[some], count - 1)[:count]]) if count else EMPTY


class TieredCache:
    """A `Policy` (see `cache.policy`) whose slots 0..near-1 are near, the others far; either may have holes.

    What is needed now and has a slot stays where it is, or rises. Then come the window's records, newest first, then
    the most used (`cache.heat`). Its moves are rises, then falls: each fall is to a slot that was free before, or to
    the one that a rise left, these in the order of the rises; `exchange` relies on it.

    Args:
        records, window, retention: as of `WindowCache`.
        near, far: slots of either kind.

    Raises:
        ValueError: a negative size, an unknown retention, or more records than can be told apart.
    """

    def __init__(self, records: int, near: int, far: int, *, window: int, retention: Retention = "frequency") -> None:
        check_sizes(records, min(near, far), window, retention)
        if records > MOST_RECORDS:
            raise ValueError(f"no two tiers for {records} records, {MOST_RECORDS} are the most")
        self.near, self.slots = near, near + far
        self.slot_of: Index = np.full(records, -1, dtype=np.int64)
        self._heat, self._window, self._keeps = Heat(records), window, retention == "frequency"
        self._tokens: deque[tuple[int, Index]] = deque()
        self._fresh: Mask = np.zeros(records, dtype=bool)  # preloaded, and not used since
        self._clock = 0

    @property
    def used(self) -> int:
        """Places occupied, anywhere."""
        return int(np.count_nonzero(self.slot_of >= 0))

    @property
    def window(self) -> list[Index]:
        """As `Policy.window`."""
        return [active for _, active in self._tokens]

    @property
    def effective_window(self) -> int:
        """As `Policy.effective_window`."""
        whole = 0
        for _, active in reversed(self._tokens):
            if bool((self.slot_of[active] < 0).any()):
                break
            whole += 1
        return whole

    def preload(self, records: Index) -> Index:
        """As `Policy.preload`: near slots first. They count as used once now.

        Raises:
            ValueError: they do not fit, or one of them is resident.
        """
        check_preload(records, self.slot_of, self.slots - self.used)
        self._clock += 1
        self._fresh[records] = True
        self._heat.use(records, self._clock)
        slots = self._free(0, self.slots)[: len(records)]
        self.slot_of[records] = slots
        return slots

    def step(self, needed: Index, recent: Sequence[Index] = ()) -> Change:
        """As `Policy.step`; moves happen as if all at once."""
        self._use(needed, recent)
        old, wanted = self.slot_of.copy(), np.zeros(len(self.slot_of), dtype=bool)
        wanted[needed], self._fresh[needed] = True, False
        pile = (np.maximum(self._heat.score, np.float32(-1)) * PILES_PER_HALVING).astype(np.int64)
        claim = claims(old, self.near, self._age(wanted), pile)
        here = (old >= 0) & (old < self.near)
        may = self._may_stay(wanted)
        near = best(claim, may & (here | wanted), self.near)
        may &= (old >= 0) | wanted
        may[near] = False
        far = best(claim, may, self.slots - self.near)
        return self._arrange(old, needed, near, far)

    # -- who is used

    def _use(self, needed: Index, recent: Sequence[Index]) -> None:
        """Stamp and count the uses, and move the window on; of a chunk its last tokens are in it."""
        last = list(recent[-self._window :]) if recent and self._window else []
        for active in (needed, *last):
            self._clock += 1
            self._heat.use(active, self._clock)
            if active is not needed or not last:
                self._tokens.append((self._clock, active))
        while len(self._tokens) > self._window:
            self._tokens.popleft()

    def _age(self, wanted: Mask) -> Index:
        """The window's tokens from 1 on, the newest the largest; beyond them who is needed now and has a slot."""
        first = self._tokens[0][0] if self._tokens else self._clock + 1
        age: Index = np.maximum(0, self._heat.stamp - first + 1)
        resident = wanted & (self.slot_of >= 0)
        age[resident] = self._clock - first + 2
        age[resident & (self.slot_of < self.near)] += 1
        return age

    def _may_stay(self, wanted: Mask) -> Mask:
        """All, or those in the window, needed now, or never used since they were preloaded."""
        if self._keeps:
            return np.ones(len(wanted), dtype=bool)
        first = self._tokens[0][0] if self._tokens else self._clock + 1
        return wanted | (self._heat.stamp >= first) | self._fresh

    # -- who goes where

    def _arrange(self, old: Index, needed: Index, near: Index, far: Index) -> Change:
        """Carry out that these records are near and those far."""
        rises, falls = near[old[near] >= self.near], far[(old[far] >= 0) & (old[far] < self.near)]
        up, down = near[old[near] < 0], far[old[far] < 0]
        self.slot_of[:] = -1
        for kept, low, high in ((near, 0, self.near), (far, self.near, self.slots)):
            there = kept[(old[kept] >= low) & (old[kept] < high)]
            self.slot_of[there] = old[there]
        self.slot_of[rises] = old[rises]  # their slots come last
        self.slot_of[falls] = old[falls]
        near_free, far_free = self._free(0, self.near), self._free(self.near, self.slots)
        near_free, far_free = np.concatenate((near_free, old[falls])), np.concatenate((far_free, old[rises]))
        for records, free in ((np.concatenate((rises, up)), near_free), (np.concatenate((falls, down)), far_free)):
            self.slot_of[records] = free[: len(records)]
        inserts, moved = np.concatenate((up, down)), np.concatenate((rises, falls))
        return Change(needed[old[needed] < 0], inserts, self.slot_of[inserts], old[moved], self.slot_of[moved])

    def _free(self, low: int, high: int) -> Index:
        """Slots of a tier that hold nothing, sorted."""
        taken = np.zeros(high - low, dtype=bool)
        taken[self.slot_of[(self.slot_of >= low) & (self.slot_of < high)] - low] = True
        return np.flatnonzero(~taken) + low


def exchange(change: Change, near: int, room: int) -> Iterator[tuple[slice, slice]]:
    """The moves of a `TieredCache` in an order in which no slot is written to before it was read: (rises, falls).

    Of each pair the rises, at most `room`, are read aside, then the falls are made, then the rises written.
    """
    rises = int(np.count_nonzero(change.move_to < near))
    vacated = np.isin(change.move_to[rises:], change.move_from[:rises])
    early = len(vacated) - int(np.count_nonzero(vacated))
    yield slice(0, 0), slice(rises, rises + early)
    for first in range(0, rises, room):
        last = min(rises, first + room)
        yield slice(first, last), slice(rises + early + first, rises + early + last)
