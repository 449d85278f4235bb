"""What every policy must do, whatever it is asked in whatever order."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flashinfer.cache import AlwaysMiss, Change, Policy, WindowCache, window_cache
from flashinfer.cache.slotmap import Index

RECORDS = 24
record_sets = st.sets(st.integers(0, RECORDS - 1)).map(lambda s: array(*sorted(s)))


def array(*records: int) -> Index:
    return np.array(records, dtype=np.int64)


class PolicyConformance(RuleBasedStateMachine):
    """The policy beside a fake row of slots that only does what the changes say, at once and in their order."""

    keeps = True

    def make(self, slots: int, window: int) -> Policy:
        raise NotImplementedError

    @initialize(slots=st.integers(0, RECORDS + 4), window=st.integers(0, 4))
    def start(self, slots: int, window: int) -> None:
        self.policy = self.make(slots, window)
        self.window = window
        self.row = np.full(max(slots, RECORDS), -1, dtype=np.int64)
        self.tokens: list[set[int]] = []

    def replay(self, change: Change) -> None:
        assert not set(change.move_from.tolist()) & set(change.move_to.tolist())
        self.row[change.move_to] = self.row[change.move_from]
        self.row[change.insert_slots] = change.insert_records
        self.row[self.policy.used :] = -1

    def resident(self) -> set[int]:
        return set(np.flatnonzero(self.policy.slot_of >= 0).tolist())

    def check_step(self, needed: set[int], before: set[int], change: Change) -> None:
        inserted = change.insert_records.tolist()
        assert change.misses.tolist() == sorted(needed - before)
        assert len(set(inserted)) == len(inserted)
        assert set(inserted) <= needed - before
        assert needed & before <= self.resident()
        self.replay(change)

    @rule(needed=record_sets)
    def token(self, needed: Index) -> None:
        before = self.resident()
        self.check_step(set(needed.tolist()), before, self.policy.step(needed))
        self.tokens.append(set(needed.tolist()))

    @rule(recent=st.lists(record_sets, min_size=1, max_size=6), earlier=record_sets)
    def chunk(self, recent: list[Index], earlier: Index) -> None:
        before = self.resident()
        needed = np.unique(np.concatenate([earlier, *recent]))
        self.check_step(set(needed.tolist()), before, self.policy.step(needed, recent))
        last = [set(active.tolist()) for active in recent[-self.window :]] if self.window else []
        rest = set(needed.tolist()) - set().union(*last)
        self.tokens += [rest, *last] if rest or not last else last

    @precondition(lambda self: self.policy.used < self.policy.slots)
    @rule(records=st.permutations(range(RECORDS)), count=st.integers(0, RECORDS))
    def preload(self, records: list[int], count: int) -> None:
        before = self.resident()
        count = min(count, self.policy.slots - self.policy.used)
        chosen = array(*[record for record in records if record not in before][:count])
        slots = self.policy.preload(chosen)
        self.row[slots] = chosen
        assert self.resident() == before | set(chosen.tolist())

    @invariant()
    def the_row_is_what_the_policy_says(self) -> None:
        used, slot_of = self.policy.used, self.policy.slot_of
        assert used <= self.policy.slots
        assert sorted(slot_of[slot_of >= 0].tolist()) == list(range(used))
        for slot in range(used):
            assert slot_of[self.row[slot]] == slot

    @invariant()
    def the_effective_window_is_true(self) -> None:
        whole = 0
        for active in reversed(self.tokens[-self.window :] if self.window else []):
            if not active <= self.resident():
                break
            whole += 1
        assert self.policy.effective_window == (whole if self.keeps else 0)


class FrequencyMachine(PolicyConformance):
    def make(self, slots: int, window: int) -> Policy:
        return WindowCache(RECORDS, slots, window=window, retention="frequency")


class WindowMachine(PolicyConformance):
    def make(self, slots: int, window: int) -> Policy:
        return WindowCache(RECORDS, slots, window=window, retention="window")


class NativeMachine(PolicyConformance):
    """The twin where the native core is not built; `test_native_window` holds the two together."""

    def make(self, slots: int, window: int) -> Policy:
        return window_cache(RECORDS, slots, window=window)


class AlwaysMissMachine(PolicyConformance):
    keeps = False

    def make(self, slots: int, window: int) -> Policy:
        return AlwaysMiss(RECORDS)


TestFrequency = FrequencyMachine.TestCase
TestWindow = WindowMachine.TestCase
TestNative = NativeMachine.TestCase
TestAlwaysMiss = AlwaysMissMachine.TestCase
TestFrequency.settings = TestWindow.settings = TestNative.settings = TestAlwaysMiss.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, derandomize=True
)
