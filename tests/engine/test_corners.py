"""Corners: odd sizes, coarse devices, contexts that end inside a tile, tokens for which nothing fires."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flashinfer import engine, pack
from flashinfer.backend import has_native, torch_backend
from flashinfer.config import BackendName, CacheConfig, Cap, IoConfig, RunConfig
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.io import AlignedBuffer
from flashinfer.model import arena, dense
from flashinfer.store.geometry import round_up
from tests.checkpoints import make_llama, make_opt
from tests.engine.strict_reader import StrictReader
from tests.twin import Twin

PROMPT = [int(t) for t in np.random.default_rng(11).integers(3, 96, 37)]
DECODED = [int(t) for t in np.random.default_rng(12).integers(3, 96, 9)]
BACKENDS: list[BackendName] = ["torch", *(["native"] if has_native() else [])]
NEURONS = 149
LLAMA = {"intermediate_size": NEURONS, "vocab_size": 257, "num_hidden_layers": 2, "max_position_embeddings": 192}
OPT = {"ffn_dim": NEURONS, "vocab_size": 257, "num_hidden_layers": 2, "max_position_embeddings": 192}
NARROW = {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}
ODD = NARROW | {"hidden_size": 39}
CHECKPOINTS: dict[str, tuple[Callable[..., Path], str, dict[str, Any]]] = {
    "odd-f16-biases": (make_llama, "float16", LLAMA | ODD | {"mlp_bias": True, "attention_bias": True}),
    "odd-bf16-tied": (make_llama, "bfloat16", LLAMA | ODD | {"tie_word_embeddings": True}),
    "narrow-f32-dense": (make_llama, "float32", LLAMA | NARROW | {"hidden_act": "silu", "mlp_bias": True}),
    "opt-bf16": (make_opt, "bfloat16", OPT | {
        "hidden_size": 36, "num_attention_heads": 3, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
}  # fmt: skip
PACKINGS: list[tuple[int, int | None, int]] = [(0, 1, 512), (1, 5, 512), (2, NEURONS, 512), (0, 3, 4096)]
"""(permutation seed or 0, bundles per record, alignment of the store); one record a layer among them."""


def packed_as(checkpoint: Path, store: Path, seed: int, bundles: int | None, alignment: int) -> Path:
    layers = range(json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"])
    order = [np.random.default_rng(seed * 10 + i).permutation(NEURONS) for i in layers] if seed else None
    pack(checkpoint, store, permutation=order, bundles_per_record=bundles, alignment=alignment)
    return store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Path]]]:
    """Name -> checkpoint, and one store for each of PACKINGS."""
    out = {}
    for name, (make, dtype, overrides) in CHECKPOINTS.items():
        root = tmp_path_factory.mktemp(name)
        checkpoint = make(root / "checkpoint", dtype=dtype, **overrides)
        stores = [packed_as(checkpoint, root / f"store-{i}", *how) for i, how in enumerate(PACKINGS)]
        out[name] = checkpoint, stores
    return out


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[StrictReader]]:
    """`device(alignment)`: from now on models read through a strict reader of that unit; returns those opened."""

    def use(alignment: int) -> list[StrictReader]:
        readers: list[StrictReader] = []

        def open_strict(paths: list[Path], config: IoConfig) -> StrictReader:
            readers.append(StrictReader([p.read_bytes() for p in paths], alignment=alignment))
            return readers[-1]

        monkeypatch.setattr(engine, "open_reader", open_strict)
        return readers

    return use


@cache
def twin_logits(checkpoint: Path, store: Path, backend: BackendName = "auto") -> tuple[npt.NDArray[np.float32], ...]:
    with Model.open(store) as model:
        twin = Twin(checkpoint, model.facts, context=192, backend=backend)
    return twin.logits(PROMPT), *(twin.logits([t])[0] for t in DECODED)


def floor_of(store: Path, run: RunConfig, **how: Any) -> int:
    with pytest.raises(CapTooSmallError) as e:
        Model.open(store, Cap(weight_memory=1), run=run, **how)
    return e.value.floor


def assert_exact(model: Model, expected: tuple[npt.NDArray[np.float32], ...]) -> None:
    session = model.session()
    assert np.array_equal(model.logits(session, PROMPT), expected[0])
    for token, logits in zip(DECODED, expected[1:], strict=True):
        assert np.array_equal(model.step(session, [token]), logits)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(CHECKPOINTS)),
    packing=st.integers(0, len(PACKINGS) - 1),
    alignment=st.sampled_from([512, 4096]),
    max_extent=st.sampled_from([4096, 12288, 1 << 20]),
    above=st.one_of(st.just(0), st.integers(0, 400_000)),
    window=st.integers(0, 4),
    retention=st.sampled_from(["frequency", "window"]),
    objective=st.sampled_from(["time", "bytes"]),
    threads=st.integers(1, 3),
    chunk=st.integers(1, 40),
    context=st.sampled_from([46, 47, 129, 192]),
    backend=st.sampled_from(BACKENDS),
    ring=st.sampled_from([0, 30_000, 1 << 20]),
)
def test_odd_sizes_bit_for_bit(
    made, device, monkeypatch, name, packing, alignment, max_extent, above, window, retention, objective, threads,
    chunk, context, backend, ring,
) -> None:  # fmt: skip
    checkpoint, stores = made[name]
    expected = twin_logits(checkpoint, stores[0], backend)
    monkeypatch.setattr(torch_backend, "PARALLEL_WORK", 0)
    device(alignment)
    run = RunConfig(
        io=IoConfig(objective=objective, max_extent=max_extent),
        cache=CacheConfig(window=window, retention=retention),
        threads=threads,
        prefill_chunk=chunk,
        staging=0,
        ring=ring,
        backend=backend,
    )
    cap = Cap(weight_memory=floor_of(stores[packing], run, context=context) + above)
    with Model.open(stores[packing], cap, context=context, run=run) as model:
        assert_exact(model, expected)


# -- the plan's bytes are all there are


@pytest.mark.parametrize("alignment", [512, 4096])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_buffer_that_holds_weights_is_in_the_plan(
    made, device, monkeypatch, backend: BackendName, name: str, threads: int, alignment: int
) -> None:
    monkeypatch.setattr(torch_backend, "PARALLEL_WORK", 0)
    device(alignment)
    store = made[name][1][1]
    run = RunConfig(threads=threads, staging=0, backend=backend)
    for above in (0, 100_000, 10**8):
        buffers, scratch = track_buffers(monkeypatch), track_scratch(monkeypatch)  # native: none is ever made
        cap = Cap(weight_memory=floor_of(store, run, context=64) + above)
        with Model.open(store, cap, context=64, run=run) as model:
            session = model.session()
            for tokens in (PROMPT, [5], [6]):
                model.step(session, tokens)
            plan = model.plan
            assert buffers.live >= plan.weight_slots + plan.weight_staging
            held = plan.weight_vectors + buffers.peak + sum(scratch.values())
            assert held <= plan.weight_total <= plan.cap
            kept = plan.weight_slots + plan.weight_staging + plan.weight_resident
            assert buffers.peak - kept + sum(scratch.values()) <= plan.weight_scratch
        assert buffers.live == 0


class Buffers:
    """Bytes of DRAM pages in aligned buffers, now and at most; a buffer counts for as long as anybody can see it."""

    live = peak = 0

    def add(self, nbytes: int) -> None:
        self.live += round_up(nbytes, 4096)
        self.peak = max(self.peak, self.live)


def track_buffers(monkeypatch: pytest.MonkeyPatch) -> Buffers:
    buffers = Buffers()

    class Tracked(AlignedBuffer):
        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            buffers.add(nbytes)
            weakref.finalize(self.array.base, buffers.add, -nbytes // 4096 * 4096)

    for module in (dense, arena):
        monkeypatch.setattr(module, "AlignedBuffer", Tracked)
    return buffers


def track_scratch(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, str], int]:
    """(thread, name) -> bytes of its scratch, filled as the backend asks for them."""
    sizes: dict[tuple[int, str], int] = {}
    scratch = torch_backend.TorchBackend._scratch

    def tracked(self, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        got = scratch(self, name, *args, **kwargs)
        sizes[threading.get_ident(), name] = got.untyped_storage().nbytes()
        return got

    monkeypatch.setattr(torch_backend.TorchBackend, "_scratch", tracked)
    return sizes


# -- contexts that end inside a tile


@pytest.mark.parametrize("length", [1, 2, 15, 17, 50])
def test_a_prompt_as_long_as_the_context(packed, length: int) -> None:
    tokens = [5 + i % 80 for i in range(length)]
    with Model.open(packed("llama").store, context=192) as model:
        expected = model.logits(model.session(), tokens)
    with Model.open(packed("llama").store, context=length) as model:
        assert np.array_equal(model.logits(model.session(), tokens), expected)
        assert np.array_equal(model.logits(model.session(), tokens), expected)


def test_the_models_own_context_may_end_inside_a_tile(tmp_path: Path) -> None:
    pack(make_llama(tmp_path / "checkpoint", max_position_embeddings=50), tmp_path / "store")
    with Model.open(tmp_path / "store") as model:
        assert model.logits(model.session(), [7] * 50).shape == (50, 96)


def test_a_truncated_session_goes_on_as_if_it_had_never_been_longer(packed) -> None:
    """Truncated across a key tile and inside a token tile, with a chunk that does not start at a tile."""
    tokens = [3 + i * 7 % 90 for i in range(140)]
    with Model.open(packed("llama").store, context=141) as model:
        fresh, cut = model.session(), model.session()
        model.step(fresh, tokens[:100])
        model.step(cut, tokens[:100])
        model.step(cut, tokens[60:101])
        cut.truncate(100)
        for part in (tokens[100:137], tokens[137:138], tokens[138:]):
            assert np.array_equal(model.logits(cut, part), model.logits(fresh, part))


# -- nothing fires


def with_gate_bias(checkpoint: Path, shift: float) -> Path:
    """Move the bias of the decision product: the lower, the fewer neurons fire."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("gate_proj.bias"):
            tensors[name] = torch.full_like(tensors[name], shift)
    save_file(tensors, file, metadata={"format": "pt"})
    return checkpoint


@pytest.mark.parametrize(("shift", "least"), [(-100.0, 0), (-2.6, 1)])
@pytest.mark.parametrize("packing", [0, 2])
def test_tokens_for_which_nothing_fires(tmp_path, device, shift: float, least: int, packing: int) -> None:
    """Every active set empty, then some: of a token, of a chunk, of a layer."""
    checkpoint = with_gate_bias(make_llama(tmp_path / "checkpoint", **LLAMA, mlp_bias=True), shift)
    store = packed_as(checkpoint, tmp_path / "store", *PACKINGS[packing])
    expected = twin_logits(checkpoint, store)
    device(4096)
    for chunk, window in ((3, 5), (40, 0), (1, 2)):
        run = RunConfig(prefill_chunk=chunk, cache=CacheConfig(window=window), staging=0)
        cap = Cap(weight_memory=floor_of(store, run, context=50))
        with Model.open(store, cap, context=50, run=run) as model:
            assert_exact(model, expected)
            used = model.ledger.decode.hits + model.ledger.decode.misses
            assert least <= used < 40 * len(DECODED)


# -- interrupts


@pytest.mark.parametrize("above", [0, 60_000])
def test_an_interrupted_wait_leaves_no_read_to_a_buffer_in_use(packed, device, above: int) -> None:
    """Ctrl-C at each wait of a step in turn: dense blocks, looked-up rows, neurons."""
    readers = device(512)
    run = RunConfig(staging=0)
    store = packed("llama").store
    cap = Cap(weight_memory=floor_of(store, run, context=64) + above)
    with Model.open(store, cap, context=64, run=run) as model:
        expected = model.step(model.session(), PROMPT), model.step(model.session(), [9])
    with Model.open(store, cap, context=64, run=run) as model:
        interrupted, at = True, 0
        while interrupted:
            for tokens, logits in zip((PROMPT, [9]), expected, strict=True):
                session = model.session()
                readers[-1].interrupt_at = at
                try:
                    model.step(session, tokens)
                    interrupted = False
                except KeyboardInterrupt:
                    interrupted = True
                readers[-1].interrupt_at = None
                assert session.length == (0 if interrupted else len(tokens))
                session.truncate(0)
                assert np.array_equal(model.step(session, tokens), logits)
            at += 1
        assert at > 10
