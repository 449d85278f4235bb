"""Streamed logits are the twin's, bit for bit, whatever decides when and from where bytes come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer import pack
from flashinfer.backend import has_native, torch_backend
from flashinfer.config import BackendName, CacheConfig, Cap, IoConfig, KvType, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from tests.checkpoints import make_llama, make_opt
from tests.twin import Twin

PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 96, 37)]
DECODED = [int(t) for t in np.random.default_rng(4).integers(3, 96, 9)]
CONTEXT = 192
BACKENDS: list[BackendName] = ["torch", *(["native"] if has_native() else [])]
CASES = [
    ("llama", "float16"), ("llama", "float32"), ("opt", "bfloat16"), ("llama-silu", "float16"),
    ("llama-fatrelu", "float16"), ("bamboo", "float16"),
]  # fmt: skip
SAYS = {
    "llama-silu": {"hidden_act": "silu"},
    "llama-fatrelu": {"hidden_act": "fatrelu", "hidden_act_param": 0.5},
    "bamboo": {"architectures": ["BambooForCausalLM"], "sliding_window": 20},
}
"""What config.json says beside what `make_llama` writes there."""


@dataclass(frozen=True)
class Made:
    checkpoint: Path
    stores: dict[tuple[int, int], Path]
    """(permutation seed, bundles per record) -> store; seed 0 is the original order."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Made]:
    out = {}
    for variant, dtype in CASES:
        root = tmp_path_factory.mktemp("exact")
        make = make_opt if variant == "opt" else make_llama
        size = {"ffn_dim" if variant == "opt" else "intermediate_size": 330}
        checkpoint = make(root / "checkpoint", dtype=dtype, max_position_embeddings=256, **size)
        said = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(said | SAYS.get(variant, {})))
        stores = {}
        for seed, bundles in [(0, 1), (0, 5), (1, 2), (2, 7)]:
            order = [np.random.default_rng(seed * 10 + i).permutation(330) for i in range(3)] if seed else None
            stores[seed, bundles] = root / f"store-{seed}-{bundles}"
            pack(checkpoint, stores[seed, bundles], permutation=order, bundles_per_record=bundles)
        out[variant, dtype] = Made(checkpoint, stores)
    return out


@cache
def twin_logits(
    checkpoint: Path, store: Path, backend: BackendName, kv_type: KvType
) -> tuple[npt.NDArray[np.float32], ...]:
    with Model.open(store) as model:
        twin = Twin(checkpoint, model.facts, context=CONTEXT, backend=backend, kv_type=kv_type)
    prompt = twin.logits(PROMPT)
    return prompt, *(twin.logits([t])[0] for t in DECODED)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(CASES),
    packing=st.sampled_from([(0, 1), (0, 5), (1, 2), (2, 7)]),
    share=st.floats(0, 1.2),
    window=st.integers(0, 8),
    retention=st.sampled_from(["frequency", "window"]),
    objective=st.sampled_from(["time", "bytes"]),
    threads=st.sampled_from([1, 2]),
    chunk=st.integers(1, 40),
    mode=st.sampled_from(["cached", "cached", "cached", "always-miss"]),
    backend=st.sampled_from(BACKENDS),
    kv_type=st.sampled_from(["f32", "f16", "int8"]),
    ring=st.sampled_from([0, 50_000, 1 << 20]),
)
def test_bit_for_bit(
    made, monkeypatch, case, packing, share, window, retention, objective, threads, chunk, mode, backend, kv_type, ring
) -> None:
    monkeypatch.setattr(torch_backend, "PARALLEL_WORK", 0)
    m = made[case]
    expected = twin_logits(m.checkpoint, m.stores[0, 1], backend, kv_type)
    run = RunConfig(
        io=IoConfig(objective=objective, threads=4),
        cache=CacheConfig(window=window, retention=retention),
        threads=threads,
        prefill_chunk=chunk,
        staging=128 * 1024,
        ring=ring,
        backend=backend,
        kv_type=kv_type,
    )
    store = m.stores[packing]
    try:
        Model.open(store, Cap(weight_memory=1), context=CONTEXT, run=run, mode=mode)
        raise AssertionError("a cap of one byte was accepted")
    except CapTooSmallError as e:
        floor = e.floor
    with Model.open(store, Cap(weight_memory=10**9), context=CONTEXT, run=run, mode=mode) as model:
        everything = model.plan.weight_total
    cap = max(floor, int(floor + share * (everything - floor)))
    with Model.open(store, Cap(weight_memory=cap), context=CONTEXT, run=run, mode=mode) as model:
        session = model.session()
        assert model.plan.total <= cap
        assert np.array_equal(model.logits(session, PROMPT), expected[0])
        for token, logits in zip(DECODED, expected[1:], strict=True):
            assert np.array_equal(model.step(session, [token]), logits)


def test_naive_agrees(made) -> None:
    m = made["llama", "float16"]
    expected = twin_logits(m.checkpoint, m.stores[0, 1], "auto", "f32")
    with Model.open(m.stores[0, 5], Cap(weight_memory=10**9), context=CONTEXT, mode="naive") as model:
        session = model.session()
        assert np.abs(model.logits(session, PROMPT) - expected[0]).max() <= 1e-5
        before = model.ledger.decode.bytes_read
        assert np.abs(model.step(session, DECODED[:1]) - expected[1]).max() <= 1e-5
        read = model.ledger.decode.bytes_read - before
        table = model.store.manifest.tensors["embed.weight"].bytes
        assert read >= model.store.manifest.weight_bytes() - table - 20_000  # vectors and rows aside


@pytest.mark.parametrize("backend", BACKENDS)
def test_twin_in_two_threads_is_the_twin(made, monkeypatch, backend: BackendName) -> None:
    monkeypatch.setattr(torch_backend, "PARALLEL_WORK", 0)
    m = made["llama", "float16"]
    with Model.open(m.stores[0, 1]) as model:
        twin = Twin(m.checkpoint, model.facts, threads=2, context=CONTEXT, backend=backend)
    assert np.array_equal(twin.logits(PROMPT), twin_logits(m.checkpoint, m.stores[0, 1], backend, "f32")[0])


def test_a_long_context_crosses_key_tiles(made) -> None:
    """Chunks that start and end anywhere, over more than one attention tile."""
    m = made["llama", "float32"]
    tokens = [int(t) for t in np.random.default_rng(5).integers(3, 96, 170)]
    results = []
    for chunk in (170, 128, 33, 7):
        with Model.open(m.stores[0, 1], context=CONTEXT, run=RunConfig(prefill_chunk=chunk)) as model:
            results.append(model.logits(model.session(), tokens))
    assert all(np.array_equal(r, results[0]) for r in results[1:])
