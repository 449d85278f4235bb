"""The cache of two tiers in C++ decides what its twin in numpy decides."""

from __future__ import annotations

import numpy as np
import pytest

from flashinfer.cache import TieredCache, tiered_cache
from flashinfer.cache.slotmap import Index
from flashinfer.cache.tiers import MOST_RECORDS
from flashinfer.config import Retention
from tests.cache.twins import RECORDS, any_sequence, assert_decide_the_same, same

native = pytest.importorskip("flashinfer.cache.native", reason="the native core is not built")


@any_sequence(150)
def test_any_sequence_gives_the_same_changes(
    near: int, far: int, window: int, retention: Retention, share: float, seed: int
) -> None:
    makers = TieredCache, native.NativeTieredCache
    twin, other = (make(RECORDS, near, far, window=window, retention=retention) for make in makers)
    assert_decide_the_same(twin, other, share=share, seed=seed)


def test_a_long_run_gives_the_same_changes() -> None:
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 2049)
    twin, other = (make(2048, 150, 300, window=3) for make in (TieredCache, native.NativeTieredCache))
    for _ in range(150):
        needed = np.flatnonzero(rng.random(2048) < 20 * popularity)
        assert same(twin.step(needed), other.step(needed))


def test_the_native_one_is_what_a_model_gets() -> None:
    assert isinstance(tiered_cache(8, 2, 2, window=2), native.NativeTieredCache)


def test_a_record_that_is_none_is_refused_and_nothing_changes() -> None:
    cache = native.NativeTieredCache(8, 2, 2, window=2)
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
        native.NativeTieredCache(**({"records": 4, "near": 1, "far": 2, "window": 1} | wrong))


@pytest.mark.parametrize("records", [np.arange(4), np.array([7])])
def test_a_preload_that_cannot_be_is_refused(records: Index) -> None:
    cache = native.NativeTieredCache(64, 2, 2, window=1)
    cache.step(np.array([7]))
    with pytest.raises(ValueError, match="free slots"):
        cache.preload(records)
