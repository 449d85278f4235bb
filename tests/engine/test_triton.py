"""A model whose feed-forward Triton's kernels compute: in the interpreter, or on a card where there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

from flashinfer.backend.torch_backend import TorchBackend
from flashinfer.backend.triton_backend import TritonBackend
from flashinfer.config import Cap, RunConfig
from flashinfer.engine import Model

CARD = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="no card, and Triton was not told to interpret"
)


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
