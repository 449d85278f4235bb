"""Products with rows of weights in Triton against their twins, and what must not change their bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.backend.on_triton import CARD, KNOWN, fused, larger_programs, runs, twin  # isort: skip  (skips without Triton)

from flashinfer.backend import triton_linear
from flashinfer.backend.base import Part
from tests.backend.backend_conformance import Layer, near, normal, packed_tiles, places_in_tiles, same, tiles_of
from tests.backend.code_conformance import LLM_INT8
from tests.backend.reference import encoded, rounding_bound, unaligned

__all__ = ["fused", "larger_programs", "twin"]
pytestmark = [runs, pytest.mark.usefixtures("larger_programs")]


def linear(backend: Any, raw: Any, codec: Any, cols: int, x: Any, first: int = 0) -> Any:
    """The products, `first` sevens before them and nine behind them."""
    out = backend.place(np.full((len(x), first + len(raw) + 9), 7, np.float32))
    matrix = backend.matrix(
        raw if isinstance(raw, torch.Tensor) else raw.reshape(-1), codec, len(raw), cols, keep=False
    )
    backend.linear(out, first, backend.place(x), matrix)
    found = backend.fetch(out)
    assert (found[:, :first] == 7).all()
    assert (found[:, first + len(raw) :] == 7).all()
    return found[:, first : first + len(raw)]


def aligned(raw: Any) -> torch.Tensor:
    """The same bytes where the kernels read them at once."""
    there = torch.from_numpy(raw.copy()).to("cuda" if CARD else "cpu")
    assert there.data_ptr() % 16 == 0
    return there


@pytest.mark.parametrize("codec", KNOWN)
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(1, 3, 39), (1, 70, 2100), (16, 1, 1), (32, 70, 133)])
def test_linear(fused, codec: str, tokens: int, rows: int, cols: int) -> None:
    raw, decoded = encoded(normal(3, rows, cols), codec)
    x = normal(4, tokens, cols)
    found = linear(fused, aligned(raw), codec, cols, x, first=4)
    assert (np.abs(found - x.astype(np.float64) @ decoded.T) <= rounding_bound(x, decoded, 0.0)).all()


@pytest.mark.parametrize("codec", ["f16", "int8g32", "int4g128z", "nf4"])
def test_with_the_cuts_that_a_card_gets(fused, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    raw, decoded = encoded(normal(3, 21, 300), codec)
    for tokens in (1, 16):
        x = normal(4, tokens, 300)
        found = linear(fused, aligned(raw), codec, 300, x)
        assert (np.abs(found - x.astype(np.float64) @ decoded.T) <= rounding_bound(x, decoded, 0.0)).all()


@pytest.mark.parametrize("cols", [1, 100, 1024, 2500])
def test_a_token_is_summed_in_the_order_that_is_written_down(fused, cols: int) -> None:
    """Lanes, and then neighbours of them. Values times one are exact, so a fused multiply-add changes nothing."""
    values = normal(1, 5, cols) * np.exp(normal(2, 5, cols) * 4)
    width = min(1024, max(16, 1 << (cols - 1).bit_length()))
    lanes = np.zeros((5, width), np.float32)
    for first in range(0, cols, width):
        some = values[:, first : first + width]
        lanes[:, : some.shape[1]] += some
    while lanes.shape[1] > 1:
        lanes = lanes[:, ::2] + lanes[:, 1::2]
    found = linear(fused, aligned(values.view(np.uint8)), "f32", cols, np.ones((1, cols), np.float32))
    assert same(found[0], lanes[:, 0])


def test_codes_of_eight_bits_have_the_bits_of_the_decoded_matrix(fused) -> None:
    for codec in ("int8g32", "int8", "fp8"):
        raw, values = encoded(normal(5, 40, 545), codec)
        for tokens in (1, 16):
            x = normal(6, tokens, 545)
            decoded = values.astype(np.float32).view(np.uint8)
            assert same(linear(fused, aligned(raw), codec, 545, x), linear(fused, aligned(decoded), "f32", 545, x))


@pytest.mark.parametrize(("codec", "cols"), [("f16", 133), ("int8g32", 133), ("int4g64", 200), ("f32", 7)])
@pytest.mark.parametrize("tokens", [1, 32])
def test_neither_place_nor_neighbours_change_a_bit(
    fused, codec: str, cols: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a matrix, other rows to a program, an odd address, a tile of tokens alone."""
    (raw, _), x = encoded(normal(3, 150, cols), codec), normal(4, tokens, cols)
    whole = linear(fused, aligned(raw), codec, cols, x)
    assert same(linear(fused, unaligned(raw).reshape(raw.shape), codec, cols, x), whole)
    blocks = [linear(fused, aligned(raw[a:b]), codec, cols, x) for a, b in ((0, 128), (128, 149), (149, 150))]
    assert same(np.concatenate(blocks, axis=1), whole)
    assert same(linear(fused, aligned(raw), codec, cols, x[-16:]), whole[-16:])
    monkeypatch.setattr(triton_linear, "ONE", triton_linear.ONE._replace(rows=16))
    monkeypatch.setattr(triton_linear, "SOME", triton_linear.SOME._replace(rows=16))
    assert same(linear(fused, aligned(raw), codec, cols, x), whole)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_token_that_is_not_finite_stays_alone(fused) -> None:
    raw, _ = encoded(normal(3, 5, 72), "int4g64")
    x = normal(4, 16, 72)
    x[3], x[5, 40], x[6, 1] = 0, np.inf, np.nan
    found = linear(fused, aligned(raw), "int4g64", 72, x)
    assert not found[3].any()
    assert np.isfinite(found).all(axis=1).tolist() == [t not in (5, 6) for t in range(16)]


# -- decide


def decided(backend: Any, layer: Layer, tokens: int, index: Any, memory: Any) -> tuple[Any, Any]:
    """The gate after `decide`, and what it must be: `linear` and `add` on the whole matrix, where named."""
    neurons, width = len(layer.raw_decision), layer.bundle.down.elements
    x, before = backend.place(normal(7, tokens, width)), np.full((tokens, neurons), 7, np.float32)
    before[:, ::2] = 0
    expected, named = before.copy(), index[index >= 0]
    expected[:, named] += layer.products(backend, x, before)[:, named]
    gate = backend.place(before)
    backend.decide(gate, x, index, memory, layer.offsets(index), layer.bundle)
    return backend.fetch(gate), expected


@pytest.mark.parametrize("codec", [*KNOWN, LLM_INT8])
@pytest.mark.parametrize("tokens", [1, 16])
def test_decide(fused, codec: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the separate matrix, of bundles that are gathered first and of those that need not be."""
    layer = Layer(codec, 90, 72, gated=True, bias=True, decision=True)
    needed = np.flatnonzero(np.random.default_rng(3).random(90) < 0.5)
    assert same(*decided(fused, layer, tokens, packed_tiles(needed), layer.memory))
    monkeypatch.setattr(fused, "_together", None)
    assert same(*decided(fused, layer, tokens, packed_tiles(needed), aligned(layer.memory)))


def test_offsets_may_be_on_the_device(fused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory lies well, nothing comes to the host."""
    layer, index = Layer("f16", 90, 72, gated=True, bias=True, decision=True), tiles_of(90)
    numbers = [torch.from_numpy(a).to(fused.vector(normal(1, 1)).device) for a in (index, layer.offsets(index))]

    def run(memory: Any, index: Any, offsets: Any) -> Any:
        x, gate, acc = (fused.place(normal(i, 1, n)) for i, n in enumerate((72, 90, 72)))
        fused.decide(gate, x, index, memory, offsets, layer.bundle)
        fused.ffn(acc, x, fused.fire(gate, "relu", index), memory, offsets, layer.bundle)
        return fused.fetch(acc)

    expected = run(layer.memory, index, layer.offsets(index))
    assert same(run(layer.memory, *numbers), expected)
    monkeypatch.setattr("flashinfer.backend.triton_backend.here", None)
    assert same(run(aligned(layer.memory), *numbers), expected)


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("bias", [True, False])
def test_decide_by_places(fused, twin, tokens: int, bias: bool) -> None:
    """Some of them named, each at its own place."""
    layer = Layer("int8g32", 150, 133, gated=False, bias=bias, decision=True)
    index = places_in_tiles(np.arange(5, 150, 7), 150)
    found, expected = decided(fused, layer, tokens, index, aligned(layer.memory))
    assert same(found, expected)
    assert near(found, decided(twin, layer, tokens, index, layer.memory)[0], 4e-6)


def test_rows_that_are_not_named_are_not_read(fused) -> None:
    layer, index = Layer("f16", 60, 40, gated=False, bias=True, decision=True), tiles_of(60)
    index[0, ::3] = -1
    at, spoilt = layer.offsets(tiles_of(60)), layer.memory.copy()
    for n in range(0, 60, 3):
        spoilt[at[0, n] : at[0, n] + layer.bundle.bytes] = 0xFF
    assert same(*decided(fused, layer, 1, index, aligned(spoilt)))


def test_what_the_kernels_do_not_know_is_the_twins(fused, twin) -> None:
    raw, _ = encoded(normal(3, 50, 72), LLM_INT8)
    for tokens in (1, 16):
        x = normal(4, tokens, 72)
        assert same(*(linear(backend, raw, LLM_INT8, 72, x) for backend in (fused, twin)))
    odd = Layer("f16", 20, 40, gated=False, bias=False, decision=True)
    assert odd.bundle.decision is not None
    bundle = replace(odd.bundle, decision=Part(odd.bundle.decision.offset, 40, LLM_INT8))
    x, index = fused.place(normal(1, 1, 40)), tiles_of(20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashinfer.backend.triton_backend.fused_decide", None)
        fused.decide(fused.zeros(1, 20), x, index, odd.memory, odd.offsets(index), bundle)
