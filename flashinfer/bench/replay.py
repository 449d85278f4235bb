"""Recorded steps through cache policies: the runtime's own, plain ones beside it, and the optimum. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.cache import WindowCache

Index = npt.NDArray[np.int64]
NEVER = np.iinfo(np.int64).max
MOST = 1 << 21
"""Records, uses and tokens lie below this, so that the three make one sort key of 63 bits."""


@dataclass(frozen=True)
class Step:
    """One decode token, or one prompt chunk, in one layer.

    sets: the sorted distinct records of each of its tokens. needed: the sorted union of them. counted: whether its
    misses are; those of other steps only warm the slots.
    """

    sets: tuple[Index, ...]
    needed: Index
    counted: bool


class Replayed(Protocol):
    """What is in the slots of one layer.

    After a step no more records are kept than there are slots; those that were there and are needed stay for this
    step (the token is computed from them, so nothing may take their place yet); what has no slot then is dropped.
    """

    def step(self, step: Step) -> int:
        """How many of the needed records were in no slot. Moves on."""
        ...

    def kept(self) -> Index:
        """The records in slots, sorted."""
        ...


def misses(policy: Replayed, steps: Sequence[Step]) -> int:
    """Records of the counted steps that were in no slot when they were needed."""
    found = [(policy.step(step), step.counted) for step in steps]
    return sum(missed for missed, counted in found if counted)


class Runtime:
    """The cache the runtime uses, as `model.neurons` drives it, but with nothing loaded beforehand."""

    def __init__(self, cache: WindowCache) -> None:
        self._cache = cache

    def step(self, step: Step) -> int:
        """As `Replayed.step`."""
        recent = step.sets if len(step.sets) > 1 else ()
        return len(self._cache.step(step.needed, recent).misses)

    def kept(self) -> Index:
        """As `Replayed.kept`."""
        return np.flatnonzero(self._cache.slot_of >= 0)


class Ranked:
    """Keeps the records of the highest rank: LRU, or LFU with the more recent first among equals.

    A chunk's tokens use their records one after the other; of one token, a higher record counts as later. Uses
    are counted for all records, in a slot or not, and never fade; a record that is used less than all that is kept
    gets no slot.

    Args:
        records: records of the layer. slots: places for them.
        frequency: whether the number of uses comes before the time of the last one.

    Raises:
        ValueError: as many records as the sort key has no room for.
    """

    def __init__(self, records: int, slots: int, *, frequency: bool) -> None:
        if records >= MOST:
            raise ValueError(f"{records} records are too many to be replayed; at most {MOST - 1}")
        self._slots, self._frequency, self._clock = slots, frequency, 0
        self._in = np.zeros(records, dtype=bool)
        self._uses = np.zeros(records, dtype=np.int64)
        self._last = np.zeros(records, dtype=np.int64)

    def step(self, step: Step) -> int:
        """As `Replayed.step`."""
        for used in step.sets:
            self._clock += 1
            self._last[used] = self._clock
            self._uses[used] += self._frequency
        missed = step.needed[~self._in[step.needed]]
        pinned = step.needed[self._in[step.needed]]
        self._in[pinned] = False
        rivals = np.concatenate((np.flatnonzero(self._in), missed))
        self._in[rivals] = False
        rank = (self._uses[rivals] * MOST + self._last[rivals]) * MOST + rivals
        self._in[largest(rivals, rank, self._slots - len(pinned))] = True
        self._in[pinned] = True
        return len(missed)

    def kept(self) -> Index:
        """As `Replayed.kept`."""
        return np.flatnonzero(self._in)


class Blended:
    """Keeps what was used most of late and of old: a score that fades at two rates.

    LRFU (Lee et al., IEEE Trans. Computers 50(12), 2001) lets each use fade at one rate, between LRU and LFU. Here each
    counts twice: `WEIGHT`, halving every `FAST` tokens, and 1, halving every `SLOW`. So what has just been used
    is preferred without being kept at all costs, as it is in a window. A record with a score below that of all that
    is kept gets no slot.
    """

    FAST, SLOW, WEIGHT = 2.0, 64.0, 16.0
    """Of what was tried, the one that is never worse than the runtime's policy: `benchmarks/results/cache.md`."""
    LONGEST = 256
    """Tokens after which the sums are scaled down again, so that they stay in the range of a float64."""

    def __init__(self, records: int, slots: int) -> None:
        self._slots, self._clock = slots, 0
        self._in = np.zeros(records, dtype=bool)
        # both as they were at clock 0: all fade alike, so the order at any time needs one number for all
        self._fast = np.zeros(records)
        self._slow = np.zeros(records)

    def step(self, step: Step) -> int:
        """As `Replayed.step`."""
        for used in step.sets:
            self._tick()
            self._fast[used] += self.WEIGHT * 2.0 ** (self._clock / self.FAST)
            self._slow[used] += 2.0 ** (self._clock / self.SLOW)
        missed = step.needed[~self._in[step.needed]]
        pinned = step.needed[self._in[step.needed]]
        self._in[pinned] = False
        rivals = np.concatenate((np.flatnonzero(self._in), missed))
        self._in[rivals] = False
        faded = 2.0 ** (self._clock / self.SLOW - self._clock / self.FAST)
        score = faded * self._fast[rivals] + self._slow[rivals]
        self._in[largest(rivals, score, self._slots - len(pinned))] = True
        self._in[pinned] = True
        return len(missed)

    def kept(self) -> Index:
        """As `Replayed.kept`."""
        return np.flatnonzero(self._in)

    def _tick(self) -> None:
        self._clock += 1
        if self._clock == self.LONGEST:
            self._fast *= 2.0 ** (-self._clock / self.FAST)
            self._slow *= 2.0 ** (-self._clock / self.SLOW)
            self._clock = 0


class Optimum:
    """The fewest counted misses any policy can have: keep what is needed soonest (Belady, "A study of replacement
    algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966), for sets.

    It is a limit, not a policy: it looks ahead, it knows which steps are counted, and it may give away the slot of a
    record this very step uses, which the others may not. Keeping a record from one use to the next saves one
    miss and takes a slot at all steps between; to have most such intervals in so many slots, those that end first
    are kept (Carlisle and Lloyd, "On the k-coloring of intervals", Discrete Applied Mathematics 59, 1995).
    """

    def __init__(self, records: int, slots: int, steps: Sequence[Step]) -> None:
        self._slots, self._at = slots, 0
        self._in = np.zeros(records, dtype=bool)
        self._until = np.full(records, NEVER, dtype=np.int64)
        self._next = next_uses(records, steps)

    def step(self, step: Step) -> int:
        """As `Replayed.step`, with the steps it was made for, in their order."""
        missed = len(step.needed) - int(np.count_nonzero(self._in[step.needed]))
        self._until[step.needed] = self._next[self._at]
        self._in[step.needed] = True
        rivals = np.flatnonzero(self._in)
        rivals = rivals[self._until[rivals] < NEVER]
        self._in[:] = False
        self._in[largest(rivals, -self._until[rivals], self._slots)] = True
        self._at += 1
        return missed

    def kept(self) -> Index:
        """As `Replayed.kept`."""
        return np.flatnonzero(self._in)


def next_uses(records: int, steps: Sequence[Step]) -> list[Index]:
    """By step, for each needed record: the next step that needs it, if its misses count, else `NEVER`."""
    ahead = np.full(records, NEVER, dtype=np.int64)
    found = []
    for at in range(len(steps) - 1, -1, -1):
        found.append(ahead[steps[at].needed])
        ahead[steps[at].needed] = at if steps[at].counted else NEVER
    return found[::-1]


def largest(records: Index, rank: Index, count: int) -> Index:
    """The `count` records of the largest rank, in any order."""
    if count >= len(records):
        return records
    if count <= 0:
        return records[:0]
    chosen: Index = records[np.argpartition(rank, len(records) - count)[len(records) - count :]]
    return chosen
