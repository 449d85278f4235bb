"""The cache of two tiers in operations on tensors decides what its twin in numpy decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.backend.bookkeeping import Tiers
from flashinfer.backend.torch_tiers import HEAD, TensorTiers
from flashinfer.cache import TieredCache
from flashinfer.cache.device import COUNTING, DeviceTieredCache
from flashinfer.cache.slotmap import Index
from flashinfer.config import TILE_NEURONS, Retention
from tests.cache.twins import RECORDS, assert_decide_the_same, same


def make(
    records: int, near: int, far: int, window: int, retention: Retention = "frequency", record_of: Index | None = None
) -> DeviceTieredCache:
    of = np.arange(records) if record_of is None else record_of
    within = np.arange(len(of)) * 10
    tiers = Tiers(records, near, far, window, retention == "frequency", COUNTING, of, within)
    return DeviceTieredCache(TensorTiers(tiers, torch.device("cpu")), near, near + far)


@given(
    near=st.integers(0, RECORDS // 2),
    far=st.integers(0, RECORDS),
    window=st.integers(0, 4),
    retention=st.sampled_from(["frequency", "window"]),
    share=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_sequence_gives_the_same_changes(
    near: int, far: int, window: int, retention: Retention, share: float, seed: int
) -> None:
    twin = TieredCache(RECORDS, near, far, window=window, retention=retention)
    assert_decide_the_same(twin, make(RECORDS, near, far, window, retention), share=share, seed=seed)


@pytest.mark.parametrize("share", [20, 300])
def test_a_long_run_gives_the_same_changes(share: int) -> None:
    """More rows than come at once, too."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 2049)
    twin, other = TieredCache(2048, 150, 300, window=3), make(2048, 150, 300, 3)
    most = 0
    for _ in range(60):
        needed = np.flatnonzero(rng.random(2048) < share * popularity)
        change = other.step(needed)
        assert same(twin.step(needed), change)
        most = max(most, len(change.misses))
    assert (most > HEAD) == (share == 300)


@given(
    neurons=st.integers(1, 150), per_record=st.integers(1, 4), near=st.integers(0, 30), far=st.integers(0, 30),
    window=st.integers(0, 3), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_who_is_chosen_by_flags(
    neurons: int, per_record: int, near: int, far: int, window: int, share: float, seed: int
) -> None:
    """A token's flags give the step, the tiles and the addresses that the host would make of them."""
    rng = np.random.default_rng(seed)
    record_of = rng.permutation(neurons) // per_record
    records = -(-neurons // per_record)
    twin, other = TieredCache(records, near, far, window=window), make(records, near, far, window, record_of=record_of)
    for _ in range(8):
        flags = rng.random(neurons) < share * rng.random(neurons)
        needed, before = np.unique(record_of[flags]), twin.slot_of.copy()
        given_flags = torch.from_numpy(flags)[None]
        assert other.core.absent(given_flags).tolist() == needed[before[needed] < 0].tolist()
        chosen = other.choose(given_flags)
        assert same(chosen.change, twin.step(needed))
        far_still = needed[(before[needed] >= near) & (twin.slot_of[needed] >= near)]
        assert chosen.far.tolist() == far_still.tolist()
        assert chosen.far_slots.tolist() == twin.slot_of[far_still].tolist()
        assert chosen.neurons == np.count_nonzero(flags)
        tiles = other.core.tiles(chosen.neurons)
        assert tiles.shape == (-(-chosen.neurons // TILE_NEURONS), TILE_NEURONS)
        listed = tiles.reshape(-1).numpy()
        assert listed[: chosen.neurons].tolist() == np.flatnonzero(flags).tolist()
        assert (listed[chosen.neurons :] == -1).all()
        at = 1000 + twin.slot_of * 77
        elsewhere = needed[(twin.slot_of[needed] < 0) | (twin.slot_of[needed] >= near)]
        at[elsewhere] = 5 * np.arange(len(elsewhere))
        found = other.core.offsets(tiles, 1000, 77, elsewhere, at[elsewhere]).reshape(-1).numpy()
        expected = at[record_of[listed]] + listed * 10
        assert np.array_equal(found, np.where(listed >= 0, expected, 0))


def test_a_preload_that_cannot_be_is_refused() -> None:
    cache = make(8, 2, 2, 1)
    cache.step(np.array([7]))
    for records in (np.arange(4), np.array([7])):
        with pytest.raises(ValueError, match="free slots"):
            cache.preload(records)
