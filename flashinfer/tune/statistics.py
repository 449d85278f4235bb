"""Who fires, token after token, counted into what the planner wants to know. One layer, one pass, bounded memory."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.cache import WindowCache
from flashinfer.config import CacheConfig
from flashinfer.store import LayerStatistics
from flashinfer.store.calibration import HOTTEST, SHARES, UNIONS, WINDOWS
from flashinfer.store.geometry import Geometry

Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

REPLAYED: Final = 2048
"""Tokens replayed through the caches at most, where nobody says: 17 caches take about a millisecond for each."""
WARM: Final = 4
"""One part in so many of the replayed tokens only fills the caches."""
CACHE: Final = 64 * 1024
"""Bytes of a cache beside its tables: lists of candidates, sets of the window."""
_BLOCK: Final = 16
"""Replayed tokens whose misses are counted together, so that the first part can be left out in the end."""
_LONGEST: Final = 1 << (UNIONS - 1)
_LENGTHS: Final = 1 << np.arange(UNIONS)
_NEVER: Final = -(1 << 40)


class LayerCounter:
    """Counts a text's needed neurons of one layer, in the order of the tokens.

    Holds a few numbers for each neuron and, for the replay, 17 caches of the layer's records.

    Args:
        geometry: where neurons lie: records hold them by stored position.
        cache: window and retention of the replay.
        replayed: tokens of it at most; the first ones of the text.
    """

    def __init__(self, geometry: Geometry, cache: CacheConfig | None = None, replayed: int = REPLAYED) -> None:
        self._neurons, self._tokens = geometry.neurons, 0
        self._uses = np.zeros(geometry.neurons, dtype=np.int64)
        self._last = np.full(geometry.neurons, _NEVER, dtype=np.int64)
        self._new = np.zeros(WINDOWS, dtype=np.int64)
        self._union = np.zeros(UNIONS, dtype=np.int64)
        self._of_age = np.zeros(_LONGEST, dtype=np.int64)
        self._replay = Replay(geometry, cache or CacheConfig(), replayed)

    def add(self, needed: Mask) -> None:
        """Count the next tokens: who is needed, `[tokens, neurons]` in the checkpoint's order of the neurons."""
        for row in needed:
            self.token(np.flatnonzero(row))

    def token(self, needed: Index) -> None:
        """Count the next token: the sorted neurons it needs."""
        age = self._tokens - self._last[needed]
        # [k]: how many of them no token among the k before needed
        fresh = np.bincount(np.minimum(age, WINDOWS), minlength=WINDOWS + 1)[::-1].cumsum()[-2::-1]
        known = min(self._tokens + 1, WINDOWS)
        self._new[:known] += fresh[:known]
        # [a]: how many neurons were last needed a tokens ago
        self._of_age[1:] = self._of_age[:-1] - np.bincount(age[age < _LONGEST], minlength=_LONGEST)[1:]
        self._of_age[0] = len(needed)
        whole = self._tokens + 1 >= _LENGTHS
        self._union[whole] += self._of_age.cumsum()[_LENGTHS[whole] - 1]
        self._uses[needed] += 1
        self._last[needed] = self._tokens
        self._tokens += 1
        self._replay.token(needed)

    def result(self) -> LayerStatistics:
        """What was counted.

        `new[k]` is over the tokens with k before them, `union` over all runs of so many tokens (all tokens, where the
        text is shorter).

        Raises:
            ValueError: fewer tokens than `new` looks back on, and one.
        """
        if self._tokens < WINDOWS:
            raise ValueError(f"statistics take {WINDOWS} tokens at least, not {self._tokens}")
        new = self._new / ((self._tokens - np.arange(WINDOWS)) * self._neurons)
        runs = self._tokens - _LENGTHS + 1
        all_of_them = np.count_nonzero(self._uses) / self._neurons
        union = np.where(runs > 0, self._union / (np.maximum(runs, 1) * self._neurons), all_of_them)
        return LayerStatistics(
            density=float(new[0]),
            new=tuple(new.tolist()),
            union=tuple(union.tolist()),
            missing=self._replay.result(),
            hot=hottest(self._uses),
        )


class Replay:
    """A text's first tokens through the runtime's cache at 17 sizes, which begin, as the runtime's do, with the first
    records as they are stored."""

    def __init__(self, geometry: Geometry, cache: CacheConfig, tokens: int) -> None:
        self._geometry, self._left, self._done = geometry, tokens, 0
        self._misses = np.zeros((-(-tokens // _BLOCK), SHARES), dtype=np.int64)
        self._caches = []
        for share in range(SHARES):
            slots = share * geometry.records // (SHARES - 1)
            self._caches.append(WindowCache(geometry.records, slots, window=cache.window, retention=cache.retention))
            self._caches[-1].preload(np.arange(slots))

    def token(self, needed: Index) -> None:
        """Replay a token, unless there were enough."""
        if self._done == self._left:
            return
        records = self._geometry.records_of(needed)
        self._misses[self._done // _BLOCK] += [len(cache.step(records).misses) for cache in self._caches]
        self._done += 1

    def result(self) -> tuple[float, ...]:
        """Records missed per token, as shares of the layer's, by size of the cache; the first part left out."""
        blocks = -(-self._done // _BLOCK)
        first = blocks // WARM
        tokens = self._done - first * _BLOCK
        missed = self._misses[first:blocks].sum(axis=0) / (tokens * self._geometry.records)
        return tuple(missed.tolist())


def hottest(uses: Index) -> tuple[float, ...]:
    """Share of all uses that falls on the most used 1, 2, 5, 10, 20 and 50 %; 0 where there is none.

    Where such a share is no whole number of neurons, a part of the next one's uses counts.
    """
    total = np.concatenate(([0], np.cumsum(np.sort(uses)[::-1])))
    shares = np.interp(np.array(HOTTEST) * len(uses), np.arange(len(total)), total) / max(1, int(total[-1]))
    return tuple(shares.tolist())


def counter_bytes(neurons: int, records: int, replayed: int = REPLAYED) -> int:
    """Memory a `LayerCounter` may take: the caches' tables for all records and their lists of candidates, above all."""
    return 32 * neurons + SHARES * (48 * records + CACHE) + 8 * SHARES * (replayed // _BLOCK + 1)
