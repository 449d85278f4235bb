"""What stays in the windowed cache: the window first, then the most used."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from flashinfer.cache import AlwaysMiss, WindowCache
from flashinfer.cache.heat import Heat
from flashinfer.cache.slotmap import Index

RECORDS = 512
Trace = list[Index]


def array(*records: int) -> Index:
    return np.array(records, dtype=np.int64)


def random_sets(count: int, size: int, seed: int = 0, records: int = RECORDS) -> Trace:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(records, size, replace=False)) for _ in range(count)]


def hits(policy: WindowCache | AlwaysMiss, trace: Trace) -> int:
    return sum(len(needed) - len(policy.step(needed).misses) for needed in trace)


def resident(policy: WindowCache) -> set[int]:
    return set(np.flatnonzero(policy.slot_of >= 0).tolist())


@pytest.mark.parametrize("retention", ["frequency", "window"])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_window_is_resident_when_it_fits(retention: Any, window: int) -> None:
    """A token's records are hits for the next `window` tokens."""
    trace = random_sets(60, 20)
    cache = WindowCache(RECORDS, window * 20, window=window, retention=retention)
    for i, needed in enumerate(trace):
        before = resident(cache)
        for past in trace[max(0, i - window) : i]:
            assert set(past.tolist()) <= before
        cache.step(needed)
        assert cache.effective_window == min(i + 1, window)


def test_the_papers_retention_holds_exactly_the_window() -> None:
    trace = random_sets(40, 30)
    cache = WindowCache(RECORDS, RECORDS, window=4, retention="window")
    for i, needed in enumerate(trace):
        cache.step(needed)
        assert resident(cache) == set(np.concatenate(trace[max(0, i - 3) : i + 1]).tolist())


def test_the_effective_window_says_how_far_the_slots_reach() -> None:
    cache = WindowCache(RECORDS, 50, window=5)
    for needed in np.arange(200).reshape(10, 20):
        cache.step(needed)
    assert cache.effective_window == 2


def test_tokens_without_records_count() -> None:
    cache = WindowCache(RECORDS, 4, window=2)
    cache.step(array(1, 2))
    assert not cache.step(array()).misses.size
    assert cache.effective_window == 2
    cache.step(array())
    cache.step(array(5, 6, 7))
    assert {5, 6, 7} < resident(cache)


@pytest.mark.parametrize("slots", [0, 100, RECORDS, 2 * RECORDS])
@pytest.mark.parametrize("retention", ["frequency", "window"])
def test_a_dense_model_pins_the_first_records(slots: int, retention: Any) -> None:
    everything = np.arange(RECORDS)
    cache = WindowCache(RECORDS, slots, window=5, retention=retention)
    first = cache.step(everything)
    assert len(first.insert_records) == min(slots, RECORDS)
    for _ in range(10):
        change = cache.step(everything)
        assert len(change.misses) == RECORDS - min(slots, RECORDS)
        assert not change.insert_records.size
        assert not change.move_from.size


def test_often_used_records_survive_a_scan() -> None:
    """After a few rounds no pass over everything else pushes them out of the slots beyond the window."""
    hot = np.arange(40)
    cache = WindowCache(RECORDS, 80, window=2)
    for _ in range(8):
        cache.step(hot)
    for start in range(100, RECORDS - 10, 10):
        cache.step(np.arange(start, start + 10))
    assert set(hot.tolist()) <= resident(cache)


def test_without_a_window_only_the_more_used_get_in() -> None:
    cache = WindowCache(RECORDS, 2, window=0)
    for _ in range(5):
        cache.step(array(1, 2))
    assert not cache.step(array(3)).insert_records.size
    for _ in range(20):
        cache.step(array(3))
    assert 3 in resident(cache)
    assert cache.effective_window == 0


def test_uses_fade() -> None:
    """What was hot once gives way to what is warm now."""
    cache = WindowCache(RECORDS, 4, window=1)
    for _ in range(50):
        cache.step(array(1, 2))
    for i in range(600):
        cache.step(array(10 + i % 3))
    cache.step(array(20, 21))
    assert resident(cache).isdisjoint({1, 2})


def test_a_chunks_last_tokens_are_its_window() -> None:
    """Of a chunk that does not fit, the last tokens' records stay."""
    cache = WindowCache(RECORDS, 30, window=2)
    recent = [np.arange(0, 10), np.arange(10, 20), np.arange(20, 30)]
    change = cache.step(np.arange(100), recent)
    assert set(range(10, 30)) <= set(change.insert_records.tolist())
    assert cache.effective_window == 2


def test_a_long_chunk_does_not_wash_out_what_is_hot() -> None:
    """Records of a chunk's early tokens compete by use, they do not displace by being new."""
    hot = np.arange(20)
    cache = WindowCache(RECORDS, 40, window=2)
    for _ in range(30):
        cache.step(hot)
    cache.step(np.arange(100, 300), [np.arange(100, 105), np.arange(105, 110)])
    assert set(hot.tolist()) | set(range(100, 110)) <= resident(cache)


def test_preloaded_records_are_hits_and_go_first() -> None:
    cache = WindowCache(RECORDS, 20, window=5)
    cache.step(np.arange(5))
    assert cache.preload(np.arange(100, 115)).tolist() == list(range(5, 20))
    assert not cache.step(np.arange(100, 105)).misses.size
    cache.step(np.arange(200, 210))
    assert set(range(5)) | set(range(100, 105)) <= resident(cache)


@pytest.mark.parametrize("records", [np.arange(3), array(7)])
def test_a_preload_that_cannot_be_is_refused(records: Index) -> None:
    cache = WindowCache(RECORDS, 3, window=1)
    cache.step(array(7))
    with pytest.raises(ValueError, match="free slots"):
        cache.preload(records)
    with pytest.raises(ValueError, match="free slots"):
        AlwaysMiss(RECORDS).preload(records)


@pytest.mark.parametrize("wrong", [{"records": -1}, {"slots": -1}, {"window": -1}, {"retention": "lru"}])
def test_impossible_caches_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        WindowCache(**({"records": 4, "slots": 2, "window": 1} | wrong))


def stories(seed: int = 0, records: int = 2048, tokens: int = 600) -> Trace:
    """Zipf popularity, a topic that changes every 150 tokens, and neurons that tend to fire again at once."""
    rng = np.random.default_rng(seed)
    popularity = rng.permutation(1 / np.arange(1, records + 1))
    trace: Trace = []
    for token in range(tokens):
        if token % 150 == 0:
            topic = np.exp(rng.standard_normal(records))
        weight = popularity * topic
        if trace:
            weight[trace[-1]] *= 7
        score = np.log(weight) + rng.gumbel(size=records)
        trace.append(np.sort(np.argpartition(-score, 120)[:120]))
    return trace


def lru_hits(trace: Trace, slots: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    found = 0
    for record in (r for needed in trace for r in needed.tolist()):
        found += record in held
        held[record] = None
        held.move_to_end(record)
        if len(held) > slots:
            held.popitem(last=False)
    return found


def random_hits(trace: Trace, slots: int, seed: int = 1) -> int:
    rng = np.random.default_rng(seed)
    held: list[int] = []
    found = 0
    for record in (r for needed in trace for r in needed.tolist()):
        if record in held:
            found += 1
        elif len(held) < slots:
            held.append(record)
        else:
            held[int(rng.integers(slots))] = record
    return found


def test_fewer_misses_than_plain_policies_at_equal_slots() -> None:
    trace = stories()
    uses = sum(len(needed) for needed in trace)

    def misses(found: int) -> int:
        return uses - found

    for slots in (300, 700):
        ours = misses(hits(WindowCache(2048, slots, window=2), trace))
        paper = misses(hits(WindowCache(2048, slots, window=2, retention="window"), trace))
        assert ours < 0.92 * misses(lru_hits(trace, slots))
        assert ours < 0.75 * misses(random_hits(trace, slots))
        assert ours < paper


def test_state_stays_small_over_a_long_run() -> None:
    """Dead candidates are dropped: what the policy remembers is bounded by its slots and window."""
    cache = WindowCache(RECORDS, RECORDS, window=3)
    for needed in random_sets(2000, 40):
        cache.step(needed)
    assert cache._heat._entries <= 2 * RECORDS + 40
    assert len(cache._tokens) == 3


def test_a_step_looks_at_candidates_as_far_as_it_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million records, half of them resident: the work follows the misses, not the slots."""
    records = 1 << 20
    cache = WindowCache(records, records // 2, window=3)
    cache.preload(np.arange(records // 2))
    looked: list[int] = []
    real = Heat._valid

    def counted(self: Heat, stamp: int, candidates: Index, slot_of: Index) -> Index:
        looked.append(len(candidates))
        return real(self, stamp, candidates, slot_of)

    monkeypatch.setattr(Heat, "_valid", counted)
    changes = [cache.step(needed) for needed in random_sets(30, 100, records=records)]
    inserted = sum(len(change.insert_records) for change in changes)
    assert inserted > 1000
    assert sum(looked) <= 4 * inserted
