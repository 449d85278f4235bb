"""What came apart and meets in one model: windows, ALiBi, soft-caps and experts with rounded keys and values, kept
sessions and shortened texts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer import pack
from flashinfer.backend import has_native
from flashinfer.config import BackendName, Cap, KvType, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from tests.families import make

FAMILIES = ["gemma2", "gemma3", "bloom", "mpt", "bamboo", "mixtral", "qwen2_moe-mixed"]
TOKENS = [int(t) for t in np.random.default_rng(8).integers(3, 89, 70)]
"""Nearly three windows of 24."""
CONTEXT = 96
BACKENDS: list[BackendName] = ["torch", *(["native"] if has_native() else [])]
NEAR = {"f16": 1e-2, "int8": 1e-1}
"""How far half of the logits may be from those with keys and values as they are; a token may get another expert."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def packed(family: str) -> Path:
        root = tmp_path_factory.mktemp(family)
        pack(make(family, root / "checkpoint"), root / "store")
        return root / "store"

    return packed


def floor_of(store: Path, run: RunConfig) -> Cap:
    with pytest.raises(CapTooSmallError) as refused:
        Model.open(store, Cap(weight_memory=1), context=CONTEXT, run=run)
    return Cap(weight_memory=refused.value.floor)


def logits(store: Path, run: RunConfig, steps: list[int], cap: Cap | None = None) -> np.ndarray:
    """Of all tokens, given so many at a time."""
    with Model.open(store, cap or Cap(weight_memory=10**9), context=CONTEXT, run=run) as model:
        session = model.session()
        out = [model.logits(session, TOKENS[session.length : session.length + count]) for count in steps]
        assert session.length == len(TOKENS)
    return np.concatenate(out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_type", ["f16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_keys_and_values(stores: Any, family: str, kv_type: KvType, backend: BackendName) -> None:
    """Near the exact ones; at the floor and, on the native backend, for every split of the prompt the same bits."""
    store, run = stores(family), RunConfig(backend=backend, kv_type=kv_type, prefill_chunk=40)
    whole = logits(store, run, [70])
    assert 0 < np.median(np.abs(whole - logits(store, RunConfig(backend=backend), [70]))) <= NEAR[kv_type]
    assert np.array_equal(logits(store, run, [70], floor_of(store, run)), whole)
    if backend == "native":
        assert np.array_equal(logits(store, run, [33, *[1] * 20, 17]), whole)


@pytest.mark.parametrize("kv_type", ["f32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_session_goes_on(stores: Any, family: str, kv_type: KvType) -> None:
    """Bit for bit, in a model opened anew, at the floor and with all of it; slots are as they were where they reach."""
    store, run = stores(family), RunConfig(kv_type=kv_type)
    with Model.open(store, Cap(weight_memory=10**9), context=CONTEXT, run=run) as model:
        session = model.session()
        model.logits(session, TOKENS[:50])
        kept, window = list(model.save(session)), model.window()
        expected = [model.step(session, [token]) for token in TOKENS[50:60]]
    for cap in (floor_of(store, run), Cap(weight_memory=10**9)):
        with Model.open(store, cap, context=CONTEXT, run=run) as model:
            session = model.restore(kept, CONTEXT, window)
            found = [model.step(session, [token]) for token in TOKENS[50:60]]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
