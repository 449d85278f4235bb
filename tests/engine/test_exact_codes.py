"""Streamed logits of a quantised store are, bit for bit, those of a twin that encodes the checkpoint itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.backend import has_native
from flashinfer.config import BackendName, Cap, IoConfig, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.quant import CODECS, PLAIN
from tests.checkpoints import make_llama
from tests.twin import Twin

PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 96, 21)]
DECODED = [int(t) for t in np.random.default_rng(4).integers(3, 96, 4)]
BACKENDS: list[BackendName] = ["torch", *(["native"] if has_native() else [])]
CODES = [name for name in CODECS if name not in {c.name for c in PLAIN}]
HIDDEN, NEURONS = 96, 150
"""Blocks of 64 and 128 end in shorter ones."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(
        tmp_path_factory.mktemp("codes") / "checkpoint", dtype="float16", hidden_size=HIDDEN, intermediate_size=NEURONS
    )


@pytest.fixture(scope="module", params=CODES)
def store(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[str, Path]:
    path = checkpoint.parent / f"{request.param}.flash"
    pack(checkpoint, path, quant=request.param, bundles_per_record=3)
    return request.param, path


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_for_bit(checkpoint: Path, store: tuple[str, Path], backend: BackendName) -> None:
    codec, path = store
    run = RunConfig(io=IoConfig(threads=4), prefill_chunk=9, staging=64 * 1024, ring=32 * 1024, backend=backend)
    with Model.open(path, Cap(weight_memory=10**9), run=run) as model:
        twin = Twin(checkpoint, model.facts, backend=backend, quant=codec)
        everything = model.plan.weight_total
    prompt, decoded = twin.logits(PROMPT), [twin.logits([t])[0] for t in DECODED]
    with pytest.raises(CapTooSmallError) as refused:
        Model.open(path, Cap(weight_memory=1), run=run)
    floor = refused.value.floor
    for cap in (floor, (floor + everything) // 2, everything):
        with Model.open(path, Cap(weight_memory=cap), run=run) as model:
            session = model.session()
            assert np.array_equal(model.logits(session, PROMPT), prompt)
            for token, expected in zip(DECODED, decoded, strict=True):
                assert np.array_equal(model.step(session, [token]), expected)
