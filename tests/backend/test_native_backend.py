"""The native backend on every instruction set this processor has, and what it promises beyond the others."""

from __future__ import annotations

import os
import threading
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.backend import Backend, Bundle, Part, Scoring
from flashinfer.backend.footprint import native_prepared
from flashinfer.quant import Codec, LlmInt8, codec_named
from flashinfer.quant.nf4 import TABLE
from flashinfer.store.facts import Activation
from tests.backend.backend_conformance import (
    CODECS,
    BackendConformance,
    Layer,
    everything,
    fired_for,
    normal,
    packed_tiles,
    same,
    tiles_of,
)
from tests.backend.code_conformance import CODES, CodeConformance, name_of
from tests.backend.reference import encoded, unaligned

kernels = pytest.importorskip("flashinfer.native._kernels", reason="the native core is not built here")
from flashinfer.backend.native_backend import NativeBackend  # noqa: E402
from flashinfer.backend.native_codec import native_codec  # noqa: E402

AVAILABLE = kernels.available()
FEW_COLUMNS = LlmInt8((0,))
"""llm.int8 for any width."""
ALL_CODECS: list[str | Codec] = [*CODECS, *CODES[:-1], FEW_COLUMNS]


class TestBest(BackendConformance):
    def make(self, threads: int) -> Backend:
        return NativeBackend(threads)


class Chosen:
    """The other instruction sets."""

    @pytest.fixture(autouse=True)
    def _chosen(self, instructions: str) -> None:
        self.instructions = instructions

    def make(self, threads: int) -> Backend:
        return NativeBackend(threads, self.instructions)


@pytest.mark.parametrize("instructions", AVAILABLE[1:], scope="class")
class TestEach(Chosen, BackendConformance):
    pass


@pytest.mark.parametrize("instructions", AVAILABLE, scope="class")
class TestCodes(Chosen, CodeConformance):
    def rounding(self, codec: str | Codec) -> float:
        return 2.0**-16 if native_codec(codec).integers else 0.0


def test_the_best_instruction_set_is_the_default() -> None:
    assert NativeBackend(1).name == f"native-{AVAILABLE[0]}"
    assert AVAILABLE[-1] == "portable"
    with pytest.raises(ValueError, match="instruction set"):
        NativeBackend(1, "mmx")


@pytest.fixture(scope="module")
def backends():
    made = [NativeBackend(1 + i % 2, name) for i, name in enumerate(AVAILABLE)]
    yield made
    for backend in made:
        backend.close()


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(ALL_CODECS),
    rows=st.integers(1, 70),
    cols=st.integers(1, 1200),
    tokens=st.integers(1, 37),
    seed=st.integers(0, 99),
)
def test_linear_is_the_same_bits_for_any_tokens_rows_and_instructions(
    backends, codec, rows, cols, tokens, seed
) -> None:
    raw, _ = encoded(normal(seed, rows, cols), codec)
    x, results = normal(seed + 1, tokens, cols), []
    for backend in backends:
        matrix = backend.matrix(unaligned(raw), codec, rows, cols, keep=False)
        together, one = backend.zeros(tokens, rows), backend.zeros(1, rows)
        backend.linear(together, 0, x, matrix)
        backend.linear(one, 0, x[-1:], matrix)
        assert same(one, together[-1:])
        single = backend.zeros(tokens, 1)
        backend.linear(single, 0, x, backend.matrix(raw[-1], codec, 1, cols, keep=False))
        assert same(single, together[:, -1:].copy())
        results.append(together)
    assert all(same(r, results[0]) for r in results[1:])


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(ALL_CODECS),
    neurons=st.integers(1, 150),
    width=st.integers(1, 300),
    tokens=st.integers(1, 35),
    share=st.sampled_from([0.02, 0.3, 0.8, 1.0]),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ffn_is_the_same_bits_however_it_is_cut(backends, codec, neurons, width, tokens, share, gated, seed) -> None:
    """Token by token with only what fires, as in decode; tile by tile; with other tokens; any instructions."""
    layer, index = Layer(codec, neurons, width, gated=gated, bias=gated, seed=seed), tiles_of(neurons)
    x, fired, offsets = normal(seed, tokens, width), fired_for(tokens, index, share, seed), layer.offsets(index)
    results = []
    for backend in backends:
        together = backend.zeros(tokens, width)
        for i in range(len(index)):
            backend.ffn(together, x, fired[i : i + 1], layer.memory, offsets[i : i + 1], layer.bundle)
        at = (seed * 7) % tokens
        picked = np.flatnonzero(fired[:, at].reshape(-1) != 0)
        packed = tiles_of(len(picked))
        some, where = np.zeros(packed.shape, np.float32), np.zeros(packed.shape, np.int64)
        some.reshape(-1)[: len(picked)] = fired[:, at].reshape(-1)[picked]
        where.reshape(-1)[: len(picked)] = offsets.reshape(-1)[picked]
        alone = backend.zeros(1, width)
        backend.ffn(alone, x[at : at + 1], some[:, None, :].copy(), layer.memory, where, layer.bundle)
        assert same(alone, together[at : at + 1])
        results.append(together)
    assert all(same(r, results[0]) for r in results[1:])


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(ALL_CODECS),
    neurons=st.integers(1, 150),
    width=st.integers(1, 700),
    tokens=st.integers(1, 35),
    share=st.sampled_from([0.02, 0.3, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_decide_is_the_same_bits_for_any_neurons_tokens_and_instructions(
    backends, codec, neurons, width, tokens, share, bias, seed
) -> None:
    layer = Layer(codec, neurons, width, gated=False, bias=bias, decision=True, seed=seed)
    needed = np.flatnonzero(np.random.default_rng(seed).random(neurons) < share)
    index, x = packed_tiles(needed), normal(seed, tokens, width)
    for backend in backends:
        expected = layer.products(backends[0], x, np.zeros((tokens, neurons), np.float32))
        together, one = backend.zeros(tokens, neurons), backend.zeros(1, neurons)
        backend.decide(together, x, index, layer.memory, layer.offsets(index), layer.bundle)
        backend.decide(one, x[-1:], index, layer.memory, layer.offsets(index), layer.bundle)
        assert same(together[:, needed], expected[:, needed])
        assert same(one, together[-1:])


def test_a_decision_bias_is_added_as_add_does(backends) -> None:
    """Signs of zero, rounding and overflow, in each codec a vector may have."""
    values = np.array([0.0, -0.0, 1, -1, 1e-7, 65504, -3e38, 1e-45], np.float32)
    codecs: list[Any] = ["f32", "f16", "bf16"]
    for codec in codecs:
        with np.errstate(over="ignore"):
            raw, bias = encoded(np.where(codec == "f16", np.clip(values, -65504, 65504), values)[:, None], codec)
        rows = np.concatenate([np.repeat(np.float32([[1e38]]), 8, axis=0).view(np.uint8), raw], axis=1)
        bundle = Bundle(rows.shape[1], Part(0, 1, "f32"), None, None, Part(0, 1, "f32"), Part(4, 1, codec))
        index = packed_tiles(np.arange(8))
        offsets = np.maximum(index, 0) * bundle.bytes
        x = np.float32([[-0.0], [1], [-3.4], [1e-45]] * 4)
        for backend in backends:
            for some in (x, x[:1], x[2:3]):
                gate = np.full((len(some), 8), -0.0, np.float32)  # added to, it changes no sign
                backend.decide(gate, some, index, rows.reshape(-1), offsets, bundle)
                product = backend.zeros(len(some), 8)
                matrix = np.repeat(np.float32(1e38), 8).view(np.uint8)
                backend.linear(product, 0, some, backend.matrix(matrix, "f32", 8, 1, keep=False))
                with np.errstate(over="ignore"):
                    assert same(gate, backend.add(product, bias[:, 0].astype(np.float32)))


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(["f32", "f16"]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    dim=st.integers(1, 70),
    value_dim=st.integers(1, 70),
    first=st.integers(0, 90),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 99),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.floats(0.125, 50, width=32),
    given_slopes=st.booleans(),
    given_sinks=st.booleans(),
)
def test_attention_is_the_same_bits_token_by_token(
    backends, dtype, kv_heads, group, dim, value_dim, first, tokens, seed, window, softcap, given_slopes, given_sinks
) -> None:
    heads, end, results = kv_heads * group, first + tokens, []
    slopes, sinks = (normal(seed, heads) if given else None for given in (given_slopes, given_sinks))
    scoring = Scoring(softcap, slopes, window, sinks)
    k, v = normal(seed, end, kv_heads * dim), normal(seed + 1, end, kv_heads * value_dim)
    q = normal(seed + 2, tokens, heads * dim)
    for backend in backends:
        kv = backend.new_kv(kv_heads, dim, end, dtype, value_dim)
        backend.append_kv(kv, 0, k, v, 0, end)
        together = backend.attend(q, kv, first, heads, scoring)
        for t in {0, tokens // 2, tokens - 1}:
            assert same(backend.attend(q[t : t + 1], kv, first + t, heads, scoring), together[t : t + 1])
        results.append(together)
    assert all(same(r, results[0]) for r in results[1:])


@pytest.mark.parametrize("codec", ALL_CODECS, ids=name_of)
def test_instruction_sets_agree_on_everything(backends, codec: str | Codec) -> None:
    for tokens in (1, 32):
        results = [everything(backend, tokens, codec, width=268) for backend in backends]
        for other in results[1:]:
            assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", get_args(Activation))
def test_instruction_sets_agree_on_activations(backends, kind: Any) -> None:
    values = np.random.default_rng(1).integers(0, 2**32, 64 * 500, dtype=np.uint64).astype(np.uint32).view(np.float32)
    gate, index = np.nan_to_num(values, nan=1.0)[None], np.arange(values.size).reshape(-1, 64)
    results = [backend.fire(gate, kind, index, 0.25) for backend in backends]
    assert all(same(np.nan_to_num(r), np.nan_to_num(results[0])) for r in results[1:])


def test_every_half_is_read_exactly(backends) -> None:
    raw = np.arange(2**16, dtype=np.uint16)
    finite = raw[np.isfinite(raw.view(np.float16))]
    for backend in backends:
        out = backend.zeros(1, len(finite))
        backend.linear(
            out,
            0,
            np.ones((1, 1), np.float32),
            backend.matrix(finite.view(np.uint8), "f16", len(finite), 1, keep=False),
        )
        assert np.array_equal(out[0], finite.view(np.float16).astype(np.float32))


def test_every_scale_and_integer_is_read_exactly(backends) -> None:
    """All finite scales, subnormal and negative ones, too, and all integers, -128 as well: whatever a file holds."""
    halves = np.arange(2**16, dtype=np.uint16)
    scales = halves[np.isfinite(halves.view(np.float16))]
    raw = np.zeros((len(scales), 34), np.uint8)
    raw[:, :2] = scales[:, None].view(np.uint8)
    raw[:, 2] = np.arange(len(scales)) % 256
    expected = codec_named("int8g32").decode(raw, 1)[:, 0]
    for backend in backends:
        out = backend.zeros(1, len(raw))
        one = np.ones((1, 1), np.float32)
        backend.linear(out, 0, one, backend.matrix(raw.reshape(-1), "int8g32", len(raw), 1, keep=False))
        assert np.array_equal(out[0], expected)


def test_silu_is_within_a_few_ulp() -> None:
    x = np.linspace(-87, 88, 64 * 2000, dtype=np.float32)
    found = NativeBackend(1).fire(x[None], "silu", np.arange(x.size).reshape(-1, 64)).reshape(-1)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(found - exact) <= 4 * np.spacing(np.abs(exact).astype(np.float32))).all()


def test_a_neuron_that_does_not_fire_adds_nothing_whatever_its_weights() -> None:
    """Not even NaN from infinite weights, nor a plus sign to a negative zero; in decode as in prefill."""
    backend, layer, index = NativeBackend(2), Layer("f32", 3, 40, gated=True, bias=False), tiles_of(3)
    layer.memory[layer.bundle.bytes * 2 : layer.bundle.bytes * 3].view(np.uint8)[:] = 0xFF  # NaN
    for tokens in (1, 16):
        acc = np.full((tokens, 40), -0.0, np.float32)
        fired = np.zeros((1, tokens, 64), np.float32)
        backend.ffn(acc, normal(1, tokens, 40), fired, layer.memory, layer.offsets(index), layer.bundle)
        assert np.signbit(acc).all()
        fired[0, 0, 1] = 1
        backend.ffn(acc, normal(1, tokens, 40), fired, layer.memory, layer.offsets(index), layer.bundle)
        assert np.isnan(acc[0]).all()
        assert not np.isnan(acc[1:]).any()


def test_a_half_cache_rounds_and_overflows_like_numpy(backends) -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2  # ties, and what lies just beside them
    values = np.concatenate([between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(1e9)),
                             [65519.99, 65520, 1e6, np.inf, 1e-8, 2.0**-25, 1e-40, 0]]).astype(np.float32)  # fmt: skip
    values = np.concatenate([values, -values])[None]
    with np.errstate(over="ignore"):
        expected = values[0].astype(np.float16).astype(np.float32)
    for backend in backends:
        kv = backend.new_kv(1, values.size, 4, "f16")
        backend.append_kv(kv, 2, values, values, 0, 1)
        assert same(backend.fetch_kv(kv, 3)[0][2], expected)


def test_bad_shapes_are_refused() -> None:
    engine = kernels.Engine(1)
    out, x, raw = np.zeros((1, 8), np.float32), np.zeros((1, 16), np.float32), np.zeros(8 * 16 * 2, np.uint8)
    f16, int8g32, int4, outlier = (native_codec(c) for c in ("f16", "int8g32", "int4g64", LlmInt8((16,))))
    engine.linear(out, 0, x, raw, f16, 8, 16)
    for bad in [(out, 1, x, raw, f16, 8, 16), (out, 0, x, raw[1:], f16, 8, 16),
                (out, 0, x[:, 1:].copy(), raw, f16, 8, 16), (out, -1, x, raw, f16, 8, 16),
                (out, 0, x, raw[:-1], int8g32, 8, 16), (out, 0, x, raw[:-1], int4, 8, 16),
                (out, 0, x, raw, outlier, 1, 16)]:  # fmt: skip
        with pytest.raises(ValueError):
            engine.linear(*bad)
    for wrong in (out[:, ::2], out.astype(np.float64), out.astype(np.float16)):
        with pytest.raises(TypeError):
            engine.linear(wrong, 0, x, raw, f16, 1, 16)
    layer, index = Layer("f16", 3, 40, gated=True, bias=False), tiles_of(3)
    backend, acc = NativeBackend(1), np.zeros((1, 40), np.float32)
    for offsets in (layer.offsets(index) + 1, layer.offsets(index) - 2 * layer.bundle.bytes):
        with pytest.raises(ValueError, match="outside"):
            backend.ffn(acc, acc, np.ones((1, 1, 64), np.float32), layer.memory, offsets, layer.bundle)


@pytest.mark.parametrize("codec", CODES, ids=name_of)
def test_prepared_activations_stay_within_the_footprint(codec: str | Codec) -> None:
    """However many tokens there are, and nothing that grows with the rows."""
    for rows, cols, tokens in [(3, 40, 1), (3, 3200, 200), (150, 3200, 70)]:
        backend, (raw, _) = NativeBackend(1), encoded(normal(1, rows, cols), codec)
        matrix = backend.matrix(raw.reshape(-1), codec, rows, cols, keep=False)
        backend.linear(backend.zeros(tokens, rows), 0, normal(2, tokens, cols), matrix)
        assert 0 < backend.scratch_bytes <= native_prepared(cols)


def test_bad_codecs_are_refused() -> None:
    good: tuple[Any, ...] = (4, 64, TABLE.tolist(), 0, 1.0, 0, [0.0] * 256, [])
    assert not kernels.Codec.codes(*good).integers
    for match, at, value in [("table", 0, 8), ("group", 1, 48), ("group", 1, 16), ("table", 2, [0.0] * 17),
                             ("scale", 3, 4), ("no such type of zero-point", 5, 3), ("of four-bit integers", 5, 2),
                             ("map", 6, [0.0]), ("outliers", 7, [1])]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            kernels.Codec.codes(*good[:at], value, *good[at + 1 :])
    with pytest.raises(ValueError, match="codec"):
        kernels.Codec(4)


def test_bad_copies_are_refused() -> None:
    engine, memory = NativeBackend()._engine, np.zeros(64, dtype=np.uint8)
    good, bad = (np.array(places, dtype=np.int64) for places in ([0, 16], [32, 49]))
    for targets, sources in ((good, bad), (bad, good), (good, -good), (good, good[:1])):
        with pytest.raises(ValueError, match=r"record|number"):
            engine.copy(memory, targets, sources, 16)
    with pytest.raises(TypeError):
        engine.copy(memory.astype(np.float32), good, good + 32, 16)


def test_bad_decisions_are_refused() -> None:
    layer, index = Layer("int8g32", 3, 40, gated=True, bias=True, decision=True), tiles_of(3)
    backend, x = NativeBackend(1), normal(1, 1, 40)
    gate, offsets, size = backend.zeros(1, 3), layer.offsets(index), layer.bundle.bytes
    decide = backend._engine.decide
    at, bias_at = layer.bundle.decision.offset, layer.bundle.decision_bias.offset
    f32, int8g32 = native_codec("f32"), native_codec("int8g32")
    good = (gate, x, index, layer.memory, offsets, size, int8g32, at, f32, bias_at)
    decide(*good)

    def swapped(**changes: Any) -> tuple[Any, ...]:
        names = ("gate", "x", "index", "memory", "offsets", "size", "codec", "at", "bias", "bias_at")
        return tuple(changes.get(name, value) for name, value in zip(names, good, strict=True))

    far = index.copy()
    far[0, 0] = 3
    for match, bad in [
        ("outside", swapped(offsets=offsets + 1 + 3 * size)), ("outside", swapped(offsets=offsets - size)),
        ("beyond", swapped(index=far)), ("differ in shape", swapped(index=index[:, :-1].copy())),
        ("behind", swapped(at=size - 67)), ("behind", swapped(bias_at=size - 3)), ("behind", swapped(codec=f32)),
        ("needs", swapped(at=-1)), ("tokens", swapped(x=normal(1, 2, 40))), ("codec", swapped(codec=None)),
        ("bias is", swapped(bias=int8g32)), ("bias is", swapped(bias=native_codec("int8"))),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            decide(*bad)


def test_many_python_threads_may_call_at_once() -> None:
    backend = NativeBackend(3)
    expected, found = everything(backend, 16), [None] * 4

    def call(i: int) -> None:
        found[i] = everything(backend, 16)  # type: ignore[call-overload]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backend.close()
    for results in found:
        assert all(same(a, b) for a, b in zip(expected, results, strict=True))  # type: ignore[call-overload]


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    backend = NativeBackend(3)
    expected = everything(backend, 16)
    child = os.fork()
    if child == 0:
        found = everything(backend, 16)
        backend.close()
        os._exit(0 if all(same(a, b) for a, b in zip(expected, found, strict=True)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(same(a, b) for a, b in zip(expected, everything(backend, 16), strict=True))
    backend.close()


def test_works_again_after_close() -> None:
    backend = NativeBackend(2)
    expected = everything(backend, 1)
    backend.close()
    assert all(same(a, b) for a, b in zip(expected, everything(backend, 1), strict=True))
    backend.close()
