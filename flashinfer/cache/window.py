"""The windowed cache: what the last tokens used stays, then what is used most.

"LLM in a flash" (arXiv 2312.11514, section 3.1) keeps exactly the union of the last k active sets and
drops a neuron when it leaves. That is `retention="window"`. With `"frequency"` the slots beyond the window
keep the most used records instead (`cache.heat`), which is what engines that stream experts found better than
recency alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashinfer.cache.heat import UNBEATABLE, Heat
from flashinfer.cache.policy import Change
from flashinfer.cache.slotmap import EMPTY, Index, SlotMap
from flashinfer.config import Retention


@dataclass
class _Token:
    """One token of the window; `left` are those of its records that it alone may still hold in the window."""

    stamp: int
    active: Index
    left: Index


def check_sizes(records: int, slots: int, window: int, retention: Retention) -> None:
    """What a windowed cache may be made of.

    Raises:
        ValueError: a negative size, or an unknown retention.
    """
    if records < 0 or slots < 0 or window < 0:
        raise ValueError(f"no cache of {slots} slots for {records} records with a window of {window}")
    if retention not in ("frequency", "window"):
        raise ValueError(f"retention is 'frequency' or 'window', not {retention!r}")


def check_preload(records: Index, slot_of: Index, free: int) -> None:
    """What must hold before a preload.

    Raises:
        ValueError: the records do not fit, or one of them is resident.
    """
    if len(records) > free or bool((slot_of[records] >= 0).any()):
        raise ValueError(f"{len(records)} records do not fit {free} free slots, or some are resident")


class WindowCache:
    """A `Policy` (see `cache.policy`), and the twin of the one in C++. A step costs work in proportion to the records
    it names.

    When a step needs room: free slots, then candidates outside the window, coldest first, then the records
    of the window's oldest tokens. What is needed now never goes, so when every record is needed at every
    token (a dense model) the first ones stay for good and the rest are transient; least-recently-used
    would hit nothing there. A miss outside the window (of a chunk's early tokens, or any when the window
    is 0) gets a place only from a record that is used less.

    Args:
        records: records of the layer.
        slots: places for them; may be 0 or more than `records`.
        window: tokens that count as the last ones; 0 leaves frequency alone to decide.
        retention: `"frequency"` keeps what leaves the window as long as there is room; `"window"` drops it,
            at the start of the first step for which it is outside (a preloaded record that no token used
            stays until its slot is needed).

    Raises:
        ValueError: a negative size, or an unknown retention.
    """

    def __init__(self, records: int, slots: int, *, window: int, retention: Retention = "frequency") -> None:
        check_sizes(records, slots, window, retention)
        self._map = SlotMap(records, slots)
        self._heat = Heat(records)
        self._window = window
        self._keeps = retention == "frequency"
        self._tokens: deque[_Token] = deque()
        self._clock = 0

    @property
    def slots(self) -> int:
        """As `Policy.slots`."""
        return self._map.slots

    @property
    def used(self) -> int:
        """As `Policy.used`."""
        return self._map.used

    @property
    def slot_of(self) -> Index:
        """As `Policy.slot_of`; read only."""
        return self._map.slot_of

    @property
    def window(self) -> list[Index]:
        """As `Policy.window`."""
        return [token.active for token in self._tokens]

    @property
    def effective_window(self) -> int:
        """As `Policy.effective_window`; costs one look at each record of the window."""
        whole = 0
        for token in reversed(self._tokens):
            if whole == self._window or bool((self.slot_of[token.active] < 0).any()):
                break
            whole += 1
        return whole

    def step(self, needed: Index, recent: Sequence[Index] = ()) -> Change:
        """As `Policy.step`."""
        misses = needed[self.slot_of[needed] < 0]
        news = self._use(needed, recent)
        drop = self._leave(len(news))
        insert = misses
        room = self._map.free + len(drop)
        if len(misses) > room:
            claims, within = self._rank(misses, news)
            evicted = self._make_room(claims, within, room)
            insert = np.sort(claims[: room + len(evicted)])
            drop = np.concatenate((drop, evicted))
        slots, move_from, move_to = self._map.replace(drop, insert)
        self._tokens.extend(news)
        self._heat.compact(self.slot_of, max(1024, 2 * self._map.slots))
        return Change(misses, insert, slots, move_from, move_to)

    def preload(self, records: Index) -> Index:
        """As `Policy.preload`. They count as used once now, and may go before any record of the window.

        Raises:
            ValueError: they do not fit, or one of them is resident.
        """
        check_preload(records, self.slot_of, self._map.free)
        self._clock += 1
        self._heat.use(records, self._clock)
        self._heat.offer(records, self._clock)
        return self._map.replace(EMPTY, records)[0]

    def _use(self, needed: Index, recent: Sequence[Index]) -> list[_Token]:
        """Stamp and count the uses; returns the tokens to add to the window, oldest first.

        What a chunk needs and none of its last tokens used belongs to an earlier token of it.
        """
        sets = [needed, *recent[-self._window :]] if recent and self._window else [needed]
        stamped = []
        for active in sets:
            self._clock += 1
            self._heat.use(active, self._clock)
            stamped.append((self._clock, active))
        if len(sets) > 1:
            stamp, _ = stamped[0]
            earlier = needed[self._heat.stamp[needed] == stamp]
            stamped[:1] = [(stamp, earlier)] if earlier.size else []
        return [_Token(stamp, active, active) for stamp, active in stamped]

    def _leave(self, arriving: int) -> Index:
        """Push the oldest tokens out of the window; returns the records to drop at once."""
        gone: list[Index] = []
        while self._tokens and len(self._tokens) + arriving > self._window:
            token = self._tokens.popleft()
            records = self._held_by(token)
            if self._keeps:
                self._heat.offer(records, token.stamp)
            else:
                gone.append(records)
        return np.concatenate(gone) if gone else EMPTY

    def _rank(self, misses: Index, news: Sequence[_Token]) -> tuple[Index, int]:
        """The misses by their claim to a place, and how many are in the window.

        The window comes first, the most used in front; then the rest likewise.
        """
        fresh = news[-self._window :] if self._window else []
        outside = self._heat.stamp[misses] < (fresh[0].stamp if fresh else self._clock + 1)
        order = np.lexsort((-self._heat.score[misses], outside))
        return misses[order], len(misses) - int(np.count_nonzero(outside))

    def _make_room(self, claims: Index, within: int, room: int) -> Index:
        """Records to evict for the claims without room: the coldest candidates, then the window's oldest.

        The first `within` claims get a place from anybody, the others only from a less used candidate.
        """
        rivals = self._heat.pile(claims[room:])
        rivals[: max(0, within - room)] = UNBEATABLE
        taken = [self._heat.coldest(rivals, self.slot_of)]
        short = within - room - len(taken[0])
        for token in self._tokens:
            if short <= 0:
                break
            records = self._held_by(token)
            taken.append(records[:short])
            token.left = records[short:]
            short -= len(taken[-1])
        return np.concatenate(taken)

    def _held_by(self, token: _Token) -> Index:
        """Resident records that no later token used."""
        records = token.left
        held: Index = records[(self._heat.stamp[records] == token.stamp) & (self.slot_of[records] >= 0)]
        return held
