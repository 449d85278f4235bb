"""One windowed cache over two tiers of slots: few near ones, where arithmetic is, and more that are far.

A record is in one place: a near slot, a far slot, or none. It rises only when it is needed, and falls when what rose
has the better claim to its slot; what falls is written to a far slot, not read again.

Everything is decided by comparing one number per record (`claims`), so the same operations on arrays of any device
decide the same: sums, comparisons, and the largest k of distinct numbers. Work is in proportion to a layer's slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from flashinfer.cache.heat import Heat
from flashinfer.cache.policy import Change
from flashinfer.cache.slotmap import Index
from flashinfer.cache.window import check_preload, check_sizes
from flashinfer.config import Retention

MOST_RECORDS, MOST_PILES = 1 << 22, 1 << 26
"""Of a layer, and of what is told apart by use: a claim has so many bits for them, and two for the tier."""
Mask = npt.NDArray[np.bool_]


def claims(records: Index, tier: Index, age: Index, pile: Index) -> Index:
    """A number for each of some records; of two, the one with the larger has the better claim to a place.

    Compared are in this order: age, pile, tier; of equals the first record of the layer.

    Args:
        records: their numbers.
        tier: 2 of who is near, 1 far, 0 elsewhere.
        age: 0 and up, the larger the newer is the last use.
        pile: of `Heat.pile`, the larger the more it is used; -1 and below of who never was.
    """
    warm = np.minimum(np.maximum(pile + 1, 0), MOST_PILES - 1)
    found: Index = ((age * MOST_PILES + warm) * 4 + tier) * MOST_RECORDS + (MOST_RECORDS - 1 - records)
    return found


def best(claim: Index, count: int) -> Mask:
    """Which of these distinct claims are among the `count` best."""
    if len(claim) <= count:
        return np.ones(len(claim), dtype=bool)
    chosen = np.zeros(len(claim), dtype=bool)
    if count:
        chosen[np.argpartition(claim, -count)[-count:]] = True
    return chosen


def check_tiers(records: int, near: int, far: int, window: int, retention: Retention) -> None:
    """What a cache of two tiers may be made of.

    Raises:
        ValueError: a negative size, an unknown retention, or more records than can be told apart.
    """
    check_sizes(records, min(near, far), window, retention)
    if records > MOST_RECORDS:
        raise ValueError(f"no two tiers for {records} records, {MOST_RECORDS} are the most")


class TieredCache:
    """A `Policy`, and the twin of the one in C++ (see `cache.policy`). Slots 0..near-1 are near, the others far; either
    may have holes.

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
        check_tiers(records, near, far, window, retention)
        self.near, self.slots = near, near + far
        self.slot_of: Index = np.full(records, -1, dtype=np.int64)
        self._record_in: Index = np.full(near + far, -1, dtype=np.int64)
        self._wanted: Mask = np.zeros(records, dtype=bool)  # during a step, who is needed
        self._heat, self._window, self._keeps = Heat(records), window, retention == "frequency"
        self._tokens: deque[tuple[int, Index]] = deque()
        self._fresh: Mask = np.zeros(records, dtype=bool)  # preloaded, and not used since
        self._clock = 0

    @property
    def used(self) -> int:
        """Places occupied, anywhere."""
        return int(np.count_nonzero(self._record_in >= 0))

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
        slots = np.flatnonzero(self._record_in < 0)[: len(records)]
        self._place(records, slots)
        return slots

    def step(self, needed: Index, recent: Sequence[Index] = ()) -> Change:
        """As `Policy.step`; moves happen in the order of `exchange`."""
        self._use(needed, recent)
        self._wanted[needed], self._fresh[needed] = True, False
        at = self.slot_of[needed]
        near, far = (held[held >= 0] for held in (self._record_in[: self.near], self._record_in[self.near :]))
        pool = self._staying(np.concatenate((near, needed[(at < 0) | (at >= self.near)])))
        up = best(self._claims(pool), self.near) if len(pool) > self.near else np.ones(len(pool), dtype=bool)
        others = self._staying(np.concatenate((pool[~up], far[~self._wanted[far]])))
        if len(others) > self.slots - self.near:
            others = others[best(self._claims(others), self.slots - self.near)]
        self._wanted[needed] = False
        return self._arrange(needed[at < 0], np.concatenate((near, far)), pool[up], others)

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

    @property
    def _first(self) -> int:
        """The stamp from which on a use is in the window."""
        return self._tokens[0][0] if self._tokens else self._clock + 1

    def _claims(self, records: Index) -> Index:
        """Of these. Of age are the window's tokens from 1 on, the newest the largest; beyond them who is needed now and
        has a slot."""
        slots, stamps = self.slot_of[records], self._heat.stamp[records]
        tier = (slots >= 0).astype(np.int64) + ((slots >= 0) & (slots < self.near))
        age = np.maximum(0, stamps - self._first + 1)
        resident = self._wanted[records] & (tier > 0)
        age[resident] = self._clock - self._first + 1 + tier[resident]
        return claims(records, tier, age, self._heat.pile(records))

    def _staying(self, records: Index) -> Index:
        """Of these all, or those in the window, needed now, or preloaded and not used since."""
        if self._keeps:
            return records
        return records[self._wanted[records] | (self._heat.stamp[records] >= self._first) | self._fresh[records]]

    # -- who goes where

    def _arrange(self, misses: Index, before: Index, near: Index, far: Index) -> Change:
        """Carry out that these records are near and those far, and no others; `before` had slots until now."""
        near_at, far_at = self.slot_of[near], self.slot_of[far]
        rises, up = np.sort(near[near_at >= self.near]), np.sort(near[near_at < 0])
        falls, down = np.sort(far[(far_at >= 0) & (far_at < self.near)]), np.sort(far[far_at < 0])
        moved, inserts = np.concatenate((rises, falls)), np.concatenate((up, down))
        old, at = self.slot_of[moved], self.slot_of[before]
        self.slot_of[before] = -1
        self.slot_of[near], self.slot_of[far] = near_at, far_at
        self._record_in[at[self.slot_of[before] < 0]] = -1
        free, left = np.flatnonzero(self._record_in < 0), len(rises)
        of_near = np.concatenate((free[free < self.near], old[left:]))
        of_far = np.concatenate((free[free >= self.near], old[:left]))
        self._record_in[old] = -1
        self._place(np.concatenate((rises, up)), of_near[: left + len(up)])
        self._place(np.concatenate((falls, down)), of_far[: len(falls) + len(down)])
        return Change(misses, inserts, self.slot_of[inserts], old, self.slot_of[moved])

    def _place(self, records: Index, slots: Index) -> None:
        self.slot_of[records] = slots
        self._record_in[slots] = records


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
