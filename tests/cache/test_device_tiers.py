"""The cache of two tiers in operations on tensors decides what its twin in numpy decides."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from flashinfer.backend.bookkeeping import Tiers
from flashinfer.backend.footprint import STEP_RECORD, TORCH
from flashinfer.backend.torch_graphs import Graphs
from flashinfer.backend.torch_tiers import HEAD, TensorTiers
from flashinfer.cache import TieredCache
from flashinfer.cache.device import COUNTING, DeviceTieredCache
from flashinfer.cache.slotmap import Index
from flashinfer.config import TILE_NEURONS, Retention
from tests.cache.twins import RECORDS, any_sequence, assert_decide_the_same, same

CPU = torch.device("cpu")


def make(
    records: int, near: int, far: int, window: int, retention: Retention = "frequency", record_of: Index | None = None
) -> DeviceTieredCache:
    of = np.arange(records) if record_of is None else record_of
    within = np.arange(len(of)) * 10
    tiers = Tiers(records, near, far, window, retention == "frequency", COUNTING, of, within)
    return DeviceTieredCache(TensorTiers(tiers, CPU, Graphs(CPU)), near, near + far)


@any_sequence(60)
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


class Allocated(TorchDispatchMode):
    """Bytes of tensors that are alive, of those made in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._seen:
                self._seen.add(key)
                size = tensor.untyped_storage().nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor.untyped_storage(), self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@pytest.mark.parametrize(("records", "window", "per_record"), [(5000, 5, 1), (5000, 0, 1), (700, 9, 8)])
def test_its_memory_stays_within_the_footprint(records: int, window: int, per_record: int) -> None:
    neurons = records * per_record - per_record // 2
    record_of = np.random.default_rng(0).permutation(neurons) // per_record
    planned = TORCH.tables([(records, neurons)], window)
    with Allocated() as allocated:
        cache = make(records, records // 2, records // 4, window, record_of=record_of)
        for share in (0.1, 0.9, 0.5):
            cache.choose(torch.from_numpy(np.random.default_rng(1).random(neurons) < share)[None])
    assert allocated.live > planned // 4
    assert allocated.peak <= planned
    assert allocated.live <= planned - STEP_RECORD * records
