"""Two tiers of slots under one policy: a record is in one place, and nothing is lost on its way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flashinfer.cache import Change, TieredCache, exchange
from flashinfer.cache.slotmap import Index
from flashinfer.cache.tiers import MOST_RECORDS, best, claims

RECORDS = 24
record_sets = st.sets(st.integers(0, RECORDS - 1)).map(lambda s: array(*sorted(s)))


def array(*values: int) -> Index:
    return np.array(values, dtype=np.int64)


class Tiers(RuleBasedStateMachine):
    """The policy beside two rows of slots that hold records' names, moved as `exchange` says."""

    retention: Any = "frequency"

    @initialize(near=st.integers(0, 10), far=st.integers(0, 20), window=st.integers(0, 4), room=st.integers(1, 5))
    def start(self, near: int, far: int, window: int, room: int) -> None:
        self.policy = TieredCache(RECORDS, near, far, window=window, retention=self.retention)
        self.near, self.far, self.room, self.window = near, far, room, window
        self.row = np.full(near + far, -1, dtype=np.int64)
        self.tokens: list[Index] = []
        self.needed = self.unused = array()

    def replay(self, change: Change) -> None:
        """A slot is written to only when what was in it has been read, or goes."""
        going = set(change.move_from.tolist())
        for up, down in exchange(change, self.near, self.room):
            assert up.stop - up.start <= self.room
            aside = self.row[change.move_from[up]].copy()
            going -= set(change.move_from[up].tolist())
            self.write(
                change.move_to[down], self.row[change.move_from[down]], going - set(change.move_from[down].tolist())
            )
            going -= set(change.move_from[down].tolist())
            self.write(change.move_to[up], aside, going)
        assert not going
        self.write(change.insert_slots, change.insert_records, going)
        held = np.flatnonzero(self.policy.slot_of >= 0)
        self.row[np.setdiff1d(np.arange(len(self.row)), self.policy.slot_of[held])] = -1

    def write(self, slots: Index, records: Index, still_to_be_read: set[int]) -> None:
        assert not still_to_be_read & set(slots.tolist())
        self.row[slots] = records

    def stepped(self, needed: Index, recent: list[Index]) -> None:
        before = self.policy.slot_of.copy()
        change = self.policy.step(needed, recent)
        self.needed, self.unused = needed, np.setdiff1d(self.unused, needed)
        self.replay(change)
        absent, here = needed[before[needed] < 0], needed[before[needed] >= 0]
        assert change.misses.tolist() == absent.tolist()
        assert set(change.insert_records.tolist()) <= set(absent.tolist())
        after = self.policy.slot_of
        assert (after[here] >= 0).all()
        assert (after[here[before[here] < self.near]] < self.near).all()
        rises = change.move_from >= self.near
        assert set(self.row[change.move_to[rises]].tolist()) <= set(needed.tolist())
        assert ((change.move_to < self.near) == rises).all()
        if self.policy.used < len(self.row) and self.retention == "frequency":
            assert (after[needed] >= 0).all()
            assert (after[before >= 0] >= 0).all()

    @rule(needed=record_sets)
    def token(self, needed: Index) -> None:
        self.stepped(needed, [])
        self.tokens.append(needed)

    @rule(recent=st.lists(record_sets, min_size=1, max_size=6), earlier=record_sets)
    def chunk(self, recent: list[Index], earlier: Index) -> None:
        if len(recent) < self.window:  # of a chunk that is shorter than the window all tokens are told
            earlier = array()
        needed = np.unique(np.concatenate([earlier, *recent]))
        self.stepped(needed, recent)
        self.tokens += recent if self.window else [needed]

    @rule(records=record_sets)
    def preload(self, records: Index) -> None:
        absent = records[self.policy.slot_of[records] < 0]
        room = len(self.row) - self.policy.used
        if len(absent) > room:
            with pytest.raises(ValueError, match="do not fit"):
                self.policy.preload(absent)
        self.unused = np.union1d(self.unused, absent[:room])
        slots = self.policy.preload(absent[:room])
        self.row[slots] = absent[:room]

    @invariant()
    def every_record_is_in_one_place(self) -> None:
        held = np.flatnonzero(self.policy.slot_of >= 0)
        slots = self.policy.slot_of[held]
        assert len(set(slots.tolist())) == len(slots) == self.policy.used <= self.near + self.far
        assert self.row[slots].tolist() == held.tolist()
        near, far = (slots < self.near).sum(), (slots >= self.near).sum()
        assert near + (self.near - near) + far + (self.far - far) == self.policy.slots == len(self.row)

    @invariant()
    def the_window_is_the_last_tokens(self) -> None:
        last = self.tokens[-self.window :] if self.window else []
        assert [w.tolist() for w in self.policy.window] == [t.tolist() for t in last]
        whole = 0
        for token in reversed(last):
            if (self.policy.slot_of[token] < 0).any():
                break
            whole += 1
        assert self.policy.effective_window == whole


class WindowTiers(Tiers):
    retention = "window"

    @invariant()
    def nothing_else_stays(self) -> None:
        """What has a slot was used in the window, by the last step, or not since it was preloaded."""
        last = self.tokens[-self.window :] if self.window else []
        allowed = {r for records in (*last, self.needed, self.unused) for r in records.tolist()}
        assert set(np.flatnonzero(self.policy.slot_of >= 0).tolist()) <= allowed


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestWindowTiers = WindowTiers.TestCase
TestWindowTiers.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_what_is_needed_rises_and_the_oldest_falls() -> None:
    cache = TieredCache(8, 2, 2, window=2)
    for token in (array(0, 1), array(2), array(3)):
        cache.step(token)
    assert sorted(np.flatnonzero((cache.slot_of >= 0) & (cache.slot_of < 2))) == [2, 3]
    change = cache.step(array(0))
    assert change.misses.tolist() == []
    assert len(change.move_from) == 2  # 0 rises, 2 falls: nothing is read
    assert set(np.flatnonzero((cache.slot_of >= 0) & (cache.slot_of < 2))) == {0, 3}
    assert (cache.slot_of[[0, 1, 2, 3]] >= 0).all()


def test_who_is_not_needed_never_rises() -> None:
    """Not even into a free slot: it would be copied for nothing."""
    cache = TieredCache(8, 2, 4, window=1)
    cache.preload(array(0, 1, 2, 3))
    for _ in range(5):
        cache.step(array(2))
    assert cache.slot_of[3] >= 2
    assert cache.slot_of[2] < 2


def test_of_a_layer_that_needs_everything_the_same_records_stay() -> None:
    """No slot changes hands where every token needs all: nothing is copied but what is missing."""
    cache, every = TieredCache(10, 3, 4, window=5), np.arange(10)
    cache.preload(np.arange(7))
    slots = cache.slot_of.copy()
    for _ in range(6):
        change = cache.step(every)
        assert change.misses.tolist() == [7, 8, 9]
        assert not len(change.move_from)
        assert not len(change.insert_records)
    assert np.array_equal(cache.slot_of, slots)


def test_the_window_only_keeps_what_the_window_used() -> None:
    cache = TieredCache(8, 1, 6, window=2, retention="window")
    for token in (array(0), array(1), array(2), array(3)):
        cache.step(token)
    assert np.flatnonzero(cache.slot_of >= 0).tolist() == [2, 3]


@given(st.lists(st.tuples(*(st.integers(0, 5),) * 3), min_size=1, max_size=30), st.data())
def test_claims_compare_age_then_use_then_tier(facts: list[tuple[int, int, int]], data: Any) -> None:
    """Against sorting tuples; the best are the first of them."""
    age, pile, tier = (array(*(fact[i] for fact in facts)) for i in range(3))
    pile, tier = pile - 2, tier // 2
    records = array(*data.draw(st.permutations(range(len(facts)))))
    claim = claims(records, tier, age, pile)
    order = sorted(range(len(facts)), key=lambda i: (-age[i], -max(-1, int(pile[i])), -tier[i], records[i]))
    assert np.argsort(-claim).tolist() == order
    assert len(set(claim.tolist())) == len(claim)
    count = data.draw(st.integers(0, len(facts) + 1))
    assert np.flatnonzero(best(claim, count)).tolist() == sorted(order[:count])


@pytest.mark.parametrize(("near", "far"), [(-1, 3), (3, -1)])
def test_sizes_are_checked(near: int, far: int) -> None:
    with pytest.raises(ValueError, match="no cache"):
        TieredCache(4, near, far, window=1)
    with pytest.raises(ValueError, match="are the most"):
        TieredCache(MOST_RECORDS + 1, 1, 1, window=1)
