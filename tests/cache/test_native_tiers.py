"""The cache of two tiers in C++ decides what its twin in numpy decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.cache import TieredCache, tiered_cache
from flashinfer.cache.slotmap import Index
from flashinfer.cache.tiers import MOST_RECORDS
from flashinfer.config import Retention
from tests.cache.test_native_window import RECORDS, same, subset

native_tiers = pytest.importorskip("flashinfer.cache.native_tiers", reason="the native core is not built")


@given(
    near=st.integers(0, RECORDS // 2),
    far=st.integers(0, RECORDS),
    window=st.integers(0, 4),
    retention=st.sampled_from(["frequency", "window"]),
    share=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_sequence_gives_the_same_changes(
    near: int, far: int, window: int, retention: Retention, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    makers = TieredCache, native_tiers.NativeTieredCache
    twin, native = (make(RECORDS, near, far, window=window, retention=retention) for make in makers)
    for _ in range(60):
        kind = rng.random()
        if kind < 0.1:
            free = np.flatnonzero(twin.slot_of < 0)[: near + far - twin.used]
            assert np.array_equal(twin.preload(free[::2]), native.preload(free[::2]))
        else:
            recent = [subset(rng, share) for _ in range(int(rng.integers(1, 6)) if kind < 0.3 else 0)]
            needed = np.unique(np.concatenate([subset(rng, share), *recent]))
            assert same(twin.step(needed, recent), native.step(needed, recent))
        assert np.array_equal(twin.slot_of, native.slot_of)
        assert twin.used == native.used
        assert twin.effective_window == native.effective_window
        assert [a.tolist() for a in twin.window] == [a.tolist() for a in native.window]


def test_a_long_run_gives_the_same_changes() -> None:
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 2049)
    twin, native = (make(2048, 150, 300, window=3) for make in (TieredCache, native_tiers.NativeTieredCache))
    for _ in range(150):
        needed = np.flatnonzero(rng.random(2048) < 20 * popularity)
        assert same(twin.step(needed), native.step(needed))


def test_the_native_one_is_what_a_model_gets() -> None:
    assert isinstance(tiered_cache(8, 2, 2, window=2), native_tiers.NativeTieredCache)


def test_a_record_that_is_none_is_refused_and_nothing_changes() -> None:
    cache = native_tiers.NativeTieredCache(8, 2, 2, window=2)
    for wrong in ([8], [-1]):
        with pytest.raises(IndexError, match="no such record"):
            cache.step(np.array(wrong))
    assert cache.used == 0
    assert cache.window == []


@pytest.mark.parametrize(
    "wrong", [{"records": -1}, {"records": MOST_RECORDS + 1}, {"near": -1}, {"far": -1}, {"window": -1},
              {"retention": "lru"}],
)  # fmt: skip
def test_impossible_caches_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        native_tiers.NativeTieredCache(**({"records": 4, "near": 1, "far": 2, "window": 1} | wrong))


@pytest.mark.parametrize("records", [np.arange(4), np.array([7])])
def test_a_preload_that_cannot_be_is_refused(records: Index) -> None:
    cache = native_tiers.NativeTieredCache(64, 2, 2, window=1)
    cache.step(np.array([7]))
    with pytest.raises(ValueError, match="free slots"):
        cache.preload(records)
