"""Statistics of firing: the one pass counts what looking at every token anew would."""

from __future__ import annotations

import tracemalloc

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.cache import WindowCache
from flashinfer.config import CacheConfig
from flashinfer.store import Geometry, LayerStatistics
from flashinfer.store.calibration import HOTTEST, _layer_fault
from flashinfer.tune.statistics import LayerCounter, counter_bytes, hottest

Mask = np.ndarray


def geometry(neurons: int, bundles: int = 1, order: np.ndarray | None = None) -> Geometry:
    return Geometry(neurons, bundles, 512 * bundles, 512, 0, order)


def text(tokens: int, neurons: int, seed: int, density: float = 0.2) -> Mask:
    """Firing that clusters in time, with hot neurons and with some that never fire."""
    rng = np.random.default_rng(seed)
    heat = rng.random(neurons) ** 3 * 2 * density
    heat[: neurons // 8] = 0
    rows = [rng.random(neurons) < heat]
    for _ in range(tokens - 1):
        rows.append(np.where(rng.random(neurons) < 0.7, rows[-1], rng.random(neurons) < heat))
    return np.array(rows)


def counted(mask: Mask, where: Geometry, cuts: int = 5, **options: object) -> LayerStatistics:
    counter = LayerCounter(where, **options)  # type: ignore[arg-type]
    for i in range(0, len(mask), cuts):
        counter.add(mask[i : i + cuts])
    return counter.result()


def naive_new(mask: Mask, k: int) -> float:
    fresh = [mask[t] & ~mask[t - k : t].any(axis=0) for t in range(k, len(mask))]
    return float(np.mean(fresh))


def naive_union(mask: Mask, length: int) -> float:
    length = min(length, len(mask))
    return float(np.mean([mask[t : t + length].any(axis=0) for t in range(len(mask) - length + 1)]))


def naive_missing(mask: Mask, where: Geometry, share: int, replayed: int) -> float:
    slots = share * where.records // 16
    cache = WindowCache(where.records, slots, window=CacheConfig().window, retention=CacheConfig().retention)
    cache.preload(np.arange(slots))
    place = np.arange(where.neurons) if where.position_of is None else where.position_of
    misses = []
    for row in mask[:replayed]:
        records = sorted({int(place[n]) // where.bundles_per_record for n in np.flatnonzero(row)})
        misses.append(len(cache.step(np.array(records, dtype=np.int64)).misses))
    left_out = -(-len(misses) // 16) // 4 * 16
    return float(np.mean(misses[left_out:]) / where.records)


@settings(max_examples=25, deadline=None)
@given(st.integers(17, 200), st.integers(8, 40), st.integers(0, 10_000), st.floats(0.0, 0.9), st.integers(1, 30))
def test_windows_and_unions_are_those_of_the_naive_count(
    tokens: int, neurons: int, seed: int, density: float, cuts: int
) -> None:
    mask = text(tokens, neurons, seed, density)
    found = counted(mask, geometry(neurons), cuts, replayed=16)
    assert found.density == pytest.approx(mask.mean())
    assert found.new == pytest.approx([naive_new(mask, k) for k in range(17)])
    assert found.union == pytest.approx([naive_union(mask, 1 << i) for i in range(8)])
    assert not _layer_fault(found)


@settings(max_examples=10, deadline=None)
@given(st.integers(20, 120), st.sampled_from([1, 3, 4]), st.booleans(), st.integers(0, 1000))
def test_misses_are_those_of_the_runtimes_cache(tokens: int, bundles: int, permuted: bool, seed: int) -> None:
    mask = text(tokens, 50, seed, 0.3)
    where = geometry(50, bundles, np.random.default_rng(seed).permutation(50) if permuted else None)
    found = counted(mask, where, replayed=100)
    for share in (0, 1, 5, 8, 13, 16):
        assert found.missing[share] == pytest.approx(naive_missing(mask, where, share, 100))


def test_more_slots_miss_less_and_none_miss_all() -> None:
    mask = text(600, 160, 3)
    found = counted(mask, geometry(160, 4))
    assert found.missing[0] == pytest.approx(mask[144:].reshape(456, 40, 4).any(axis=2).mean())
    assert found.missing[16] == 0
    assert (np.diff(found.missing) <= 0.002).all()
    assert found.missing[8] < 0.7 * found.missing[0]


def test_only_the_first_tokens_are_replayed_and_a_part_of_them_counts() -> None:
    mask = text(400, 64, 1)
    changed = mask.copy()
    changed[128:] = ~changed[128:]
    short, other = (counted(m, geometry(64), replayed=128) for m in (mask, changed))
    assert short.missing == other.missing
    assert short.new != other.new
    begun = mask.copy()
    begun[:32] = False
    begun[0] = mask[0]
    no_slots = [counted(m, geometry(64), replayed=128).missing[0] for m in (mask, begun)]
    assert no_slots[0] == no_slots[1] == pytest.approx(mask[32:128].mean())


def test_the_hottest_neurons_shares() -> None:
    uses = np.zeros(200, dtype=np.int64)
    uses[[5, 17, 80]] = 60, 30, 10
    assert hottest(uses) == pytest.approx((0.9, 1.0, 1.0, 1.0, 1.0, 1.0))
    assert hottest(np.full(1000, 3)) == pytest.approx(HOTTEST)
    assert hottest(np.array([8, 2])) == pytest.approx((0.016, 0.032, 0.08, 0.16, 0.32, 0.8))
    assert hottest(np.zeros(40, dtype=np.int64)) == (0.0,) * 6


def test_hotness_is_counted_over_the_whole_text() -> None:
    mask = text(300, 100, 2)
    assert counted(mask, geometry(100)).hot == hottest(mask.sum(axis=0))


@pytest.mark.parametrize("fill", [False, True])
def test_all_or_nothing(fill: bool) -> None:
    found = counted(np.full((40, 24), fill), geometry(24, 2))
    assert found.density == fill
    assert found.new[1:] == (0.0,) * 16
    assert found.union == (float(fill),) * 8
    assert found.missing[0] == fill
    assert not _layer_fault(found)
    assert msgspec.json.decode(msgspec.json.encode(found), type=LayerStatistics) == found


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens"):
        counted(text(16, 10, 0), geometry(10))


@pytest.mark.parametrize(("neurons", "bundles"), [(2000, 1), (2000, 8), (60, 4)])
def test_memory_is_bounded_by_the_estimate(neurons: int, bundles: int) -> None:
    where = geometry(neurons, bundles)
    mask = text(200, neurons, 0)
    tracemalloc.start()
    try:
        counter = LayerCounter(where)
        counter.add(mask)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.05 < peak / counter_bytes(neurons, where.records) < 1
