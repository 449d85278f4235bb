"""How used a record is, and which of those that may go is the least used.

The score is that of LRFU (Lee et al., "LRFU: a spectrum of policies", IEEE Trans. Computers 50(12), 2001):
each use counts 1 and halves in weight every `HALF_LIFE` tokens. Kept as its logarithm relative to time 0,
a score changes only when its record is used, so nothing ever has to be aged. The order is
kept by a calendar queue: one pile per score range, emptied from the lowest.
"""

from __future__ import annotations

import heapq
from collections import deque

import numpy as np
import numpy.typing as npt

from flashinfer.cache.slotmap import EMPTY, Index

HALF_LIFE = 64.0
"""Tokens after which a use weighs half. Of 16, 64, 256 and 1024, 64 was ahead of LRU on stationary synthetic
traces and on those that change topic every 300 tokens; 256 gains 1 % of the hits where nothing ever changes,
and loses 1-2 % where something does."""
PILES_PER_HALVING = 2
"""Resolution of the order: scores within half a halving count as equal, the older entry goes first. Finer piles
gain under 0.3 % of the hits, and a step's cost grows with the piles it empties."""
SMALLEST_LOOK = 64
"""Candidates looked at together at the least."""
UNBEATABLE = 2**62
"""A rival's pile that beats every candidate's."""
STEPS = 64
"""Steps of a halving in which the difference of two scores is told apart when they are added."""
ADDED: npt.NDArray[np.float32] = np.log2(1 + np.exp2(-np.arange(24 * STEPS + 1) / STEPS)).astype(np.float32)
"""What a score gains from another that is so many steps lower: log2(2**a + 2**b) - max(a, b). A table, so that the
native policy has the same scores to the last bit on every machine."""


class Heat:
    """Scores of all records, and the candidates for eviction among them.

    `stamp[r]` says when record r was last used (the owner counts tokens); a candidate whose record
    has another stamp now was used again, and is skipped. Costs grow with the records named, not with all.
    """

    def __init__(self, records: int) -> None:
        self.stamp: npt.NDArray[np.int64] = np.full(records, -1, dtype=np.int64)
        self.score: npt.NDArray[np.float32] = np.full(records, -np.inf, dtype=np.float32)
        self._piles: dict[int, deque[tuple[int, Index]]] = {}
        self._order: list[int] = []
        self._entries = 0

    def use(self, records: Index, stamp: int) -> None:
        """Count one use of each record by the token with this stamp."""
        old, now = self.score[records], np.float32(stamp / HALF_LIFE)
        high, low = np.maximum(old, now), np.minimum(old, now)
        self.stamp[records] = stamp
        self.score[records] = high + ADDED[np.minimum((high - low) * STEPS, len(ADDED) - 1).astype(np.int64)]

    def pile(self, records: Index) -> Index:
        """The pile each record belongs to: a higher one is more used."""
        return (self.score[records] * PILES_PER_HALVING).astype(np.int64)

    def offer(self, records: Index, stamp: int) -> None:
        """Let these records go when room is needed, unless their stamp is another by then."""
        if not records.size:
            return
        piles = self.pile(records)
        order = np.argsort(piles, kind="stable")
        piles = piles[order]
        cuts = np.flatnonzero(np.diff(piles)) + 1
        for pile, part in zip(piles[np.concatenate(([0], cuts))].tolist(), np.split(records[order], cuts), strict=True):
            if pile not in self._piles:
                self._piles[pile] = deque()
                heapq.heappush(self._order, pile)
            self._piles[pile].append((stamp, part))
        self._entries += len(records)

    def coldest(self, rivals: Index, slot_of: Index) -> Index:
        """Take resident candidates, the least used first, while a rival from a higher pile wants a place.

        Args:
            rivals: pile of each record that wants a place; each can turn out one candidate.
            slot_of: the residents' slots.
        """
        taken: list[Index] = []
        count = 0
        while self._order:
            wanted = int(np.count_nonzero(rivals > self._order[0])) - count
            if wanted <= 0:
                break
            found = self._take(self._piles[self._order[0]], wanted, slot_of)
            if len(found) < wanted:
                del self._piles[heapq.heappop(self._order)]
            taken.append(found)
            count += len(found)
        return np.concatenate(taken) if taken else EMPTY

    def _take(self, entries: deque[tuple[int, Index]], count: int, slot_of: Index) -> Index:
        """Take up to `count` live candidates from the front of one pile, looking at about as many as it takes."""
        taken: list[Index] = []
        while count > 0 and entries:
            stamp, records = entries.popleft()
            look = max(2 * count, SMALLEST_LOOK)
            if len(records) > look:
                entries.appendleft((stamp, records[look:]))
            valid = self._valid(stamp, records[:look], slot_of)
            if len(valid) > count:
                entries.appendleft((stamp, valid[count:]))
            taken.append(valid[:count])
            count -= len(taken[-1])
        return np.concatenate(taken) if taken else EMPTY

    def compact(self, slot_of: Index, limit: int) -> None:
        """Drop dead candidates once more than `limit` were offered; at most `slots` can be alive."""
        if self._entries <= limit:
            return
        for pile, entries in self._piles.items():
            alive = ((stamp, self._valid(stamp, records, slot_of)) for stamp, records in entries)
            self._piles[pile] = deque((stamp, records) for stamp, records in alive if records.size)
        self._piles = {pile: entries for pile, entries in self._piles.items() if entries}
        self._order = sorted(self._piles)
        self._entries = sum(len(records) for entries in self._piles.values() for _, records in entries)

    def _valid(self, stamp: int, records: Index, slot_of: Index) -> Index:
        kept: Index = records[(self.stamp[records] == stamp) & (slot_of[records] >= 0)]
        return kept
