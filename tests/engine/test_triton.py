"""A model whose attention and products of weights Triton's kernels compute: in the interpreter, or on a card where
there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backend.on_triton import CARD, larger_programs, runs  # isort: skip  (skips without Triton)

from flashinfer.backend.torch_backend import TorchBackend
from flashinfer.backend.triton_backend import TritonBackend
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model

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
