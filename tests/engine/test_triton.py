"""A model whose attention and products of weights Triton's kernels compute: in the interpreter, or on a card where
there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend.on_triton import CARD, larger_programs, runs  # isort: skip  (skips without Triton)

from flashinfer.backend.torch_backend import TorchBackend
from flashinfer.backend.torch_tiers import TensorTiers
from flashinfer.backend.triton_backend import TritonBackend
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.store import open_store
from tests.backend.late_copies import LateCopies

__all__ = ["larger_programs"]
pytestmark = [runs, pytest.mark.usefixtures("larger_programs")]


@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_the_same_bits_at_every_cap_near_the_twins(packed, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(make: Any, cap: Cap) -> Any:
        monkeypatch.setattr("flashinfer.engine.open_backend", lambda *_: make("cuda" if CARD else "cpu", 1))
        run = RunConfig(threads=1, prefill_chunk=32, staging=64 * 1024, ring=1 << 18)
        with Model.open(store, cap, context=64, run=run) as model:
            session = model.session()
            return np.concatenate([model.logits(session, some) for some in ([5, 9, 40, 7] * 4, [3])])

    store: Path = packed(variant, "float16").store
    plenty, little = (logits(TritonBackend, cap) for cap in (Cap(), Cap(weight_memory=400_000)))
    assert np.array_equal(plenty, little)
    assert np.abs(plenty - logits(TorchBackend, Cap())).max() < 1e-4


def test_slots_of_a_device_change_no_bit(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is needed, tiles and offsets come from the bookkeeping on the device, and so do the kernels' addresses."""
    store: Path = packed("opt", "float16").store
    asked: list[int] = []

    def noted(self: TensorTiers, count: int) -> Any:
        asked.append(count)
        return tiles(self, count)

    def opened(*_: Any) -> TritonBackend:
        backend = TritonBackend("cuda" if CARD else "cpu", 1)
        if not CARD:
            backend.copies = LateCopies(1 << 30)
        return backend

    def logits(cap: Cap) -> Any:
        with Model.open(store, cap, context=64, run=RunConfig(threads=1)) as model:
            session = model.session()
            return np.concatenate([model.logits(session, some) for some in ([5, 9, 40, 7] * 4, [3])])

    tiles = TensorTiers.tiles
    monkeypatch.setattr(TensorTiers, "tiles", noted)
    monkeypatch.setattr("flashinfer.engine.open_backend", opened)
    with pytest.raises(CapTooSmallError) as e:
        Model.open(store, Cap(vram=1), context=64, run=RunConfig(threads=1))
    without = logits(Cap(vram=e.value.floor))
    assert not asked
    found = logits(Cap(vram=e.value.floor + 2 * open_store(store).manifest.weight_bytes()))
    assert asked
    assert np.array_equal(found, without)
