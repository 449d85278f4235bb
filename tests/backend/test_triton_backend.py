"""The fused feed-forward against its twin: in Triton's interpreter, or on a card where there is one."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from tests.backend.on_triton import DEVICE, KNOWN, fused, larger_programs, runs, twin  # isort: skip  (skips without Triton)

from flashinfer.backend import triton_backend, triton_ffn, triton_linear
from flashinfer.backend.base import Part
from flashinfer.backend.triton_codes import form_of
from flashinfer.store.facts import UpActivation
from tests.backend.backend_conformance import Layer, fired_for, near, normal, same, tiles_of
from tests.backend.code_conformance import LLM_INT8, MIXES, name_of

__all__ = ["fused", "larger_programs", "twin"]
pytestmark = [runs, pytest.mark.usefixtures("larger_programs")]


def run(backend: Any, layer: Layer, tokens: int, share: float = 0.5, memory: Any = None, **other: Any) -> Any:
    """What a backend adds to the same numbers for a layer's neurons."""
    index = other.get("index", tiles_of(len(layer.down)))
    fired = other.get("fired", fired_for(tokens, index, share))
    at = other.get("offsets", layer.offsets(index))
    width = layer.up.shape[1] if layer.up is not None else 8
    acc, x = normal(8, tokens, layer.down.shape[1]), other.get("scale", 1) * normal(7, tokens, width)
    acc, x = backend.place(acc), backend.place(x)
    backend.ffn(acc, x, backend.place(fired), layer.memory if memory is None else memory, at, layer.bundle)
    return backend.fetch(acc)


# -- against the twin


@pytest.mark.parametrize(("codec", "down"), [*((c, c) for c in KNOWN), *MIXES, ("f16", "f32")], ids=name_of)
@pytest.mark.parametrize(("tokens", "width"), [(1, 133), (16, 40)])
def test_every_codec(fused, twin, codec: str, down: str, tokens: int, width: int) -> None:
    layer = Layer(codec, 50, width, gated=True, bias=True, down=down)
    index = tiles_of(50)
    found = run(fused, layer, tokens)
    fired = fired_for(tokens, index, 0.5)
    assert near(found, layer.expected(normal(8, tokens, width), normal(7, tokens, width), fired, index))
    assert near(found, run(twin, layer, tokens), 4e-6)


@pytest.mark.parametrize("tokens", [1, 48])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, False)])
@pytest.mark.parametrize("share", [1.0, 0.05])
def test_several_tiles(fused, twin, gated: bool, bias: bool, tokens: int, share: float) -> None:
    layer = Layer("f16", 130, 48, gated=gated, bias=bias)
    assert near(run(fused, layer, tokens, share), run(twin, layer, tokens, share), 4e-6)


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("of_up", get_args(UpActivation))
def test_products_with_up_are_activated(fused, twin, tokens: int, of_up: UpActivation) -> None:
    layer = Layer("f16", 60, 40, gated=True, bias=True, up_activation=of_up)
    found, expected = (run(backend, layer, tokens, scale=np.float32(9)) for backend in (fused, twin))
    assert near(found, expected, 4e-6)


@pytest.mark.parametrize("codec", KNOWN)
def test_a_neuron_alone_adds_its_decoded_row(fused, codec: str) -> None:
    """To the bit."""
    layer, index = Layer(codec, 64, 300, gated=False, bias=False), tiles_of(64)
    for n in (3, 62):
        acc, fired = fused.zeros(1, 300), np.zeros((1, 1, 64), np.float32)
        fired[0, 0, n] = 1
        fused.ffn(acc, acc, fused.place(fired), layer.memory, layer.offsets(index), layer.bundle)
        assert np.array_equal(fused.fetch(acc)[0], layer.down[n])


@pytest.mark.parametrize("codec", ["int4g128", "int4g128z"])
def test_a_group_may_be_wider_than_what_is_taken_at_once(
    fused, twin, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three scales of 128 columns, of which a program takes 64."""
    monkeypatch.undo()
    assert triton_linear.SOME.units == 32
    layer = Layer(codec, 20, 300, gated=True, bias=False)
    assert near(run(fused, layer, 16), run(twin, layer, 16), 4e-6)


# -- what must not matter


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("codec", ["f16", "nf4"])
def test_what_fires_zero_is_not_looked_at(fused, codec: str, tokens: int) -> None:
    """Its bytes may be no numbers, and its offset anything within the memory."""
    layer, index = Layer(codec, 60, 40, gated=True, bias=True), tiles_of(60)
    fired, at = fired_for(tokens, index, 0.5), layer.offsets(index)
    fired[:, :, ::3] = 0
    expected = run(fused, layer, tokens, fired=fired)
    spoilt = layer.memory.copy()
    for n in range(0, 60, 3):
        spoilt[at[0, n] : at[0, n] + layer.bundle.bytes] = 0xFF
    assert same(run(fused, layer, tokens, fired=fired, memory=spoilt), expected)
    at[0, ::3] = layer.bundle.bytes
    assert same(run(fused, layer, tokens, fired=fired, offsets=at), expected)


@pytest.mark.parametrize(("codec", "tokens"), [("f16", 1), ("int4g64", 1), ("f16", 32)])
def test_neither_place_nor_calls_change_a_bit(fused, codec: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read where they lie or gathered first, in one call or several, few tiles' outputs waiting or many."""
    layer, index = Layer(codec, 70, 40, gated=True, bias=True), tiles_of(70)
    once = run(fused, layer, tokens)
    assert same(run(fused, layer, tokens), once)
    assert layer.memory.ctypes.data % 2  # these were gathered
    there = torch.from_numpy(layer.memory.copy()).to(fused._device)
    assert same(run(fused, layer, tokens, memory=there), once)
    monkeypatch.setattr(triton_ffn, "PARTIAL", 1)
    assert same(run(fused, layer, tokens, memory=there), once)
    acc, x = fused.place(normal(8, tokens, 40)), fused.place(normal(7, tokens, 40))
    fired, at = fired_for(tokens, index, 0.5), layer.offsets(index)
    for part in (slice(0, 1), slice(1, 1), slice(1, 2)):
        fused.ffn(acc, x, fused.place(fired[part]), there, at[part], layer.bundle)
    assert same(fused.fetch(acc), once)


def test_a_tile_of_tokens_does_not_notice_the_others(fused) -> None:
    layer, index = Layer("int8", 60, 40, gated=True, bias=True), tiles_of(60)
    fired, x, acc = fired_for(48, index, 0.2), normal(7, 48, 40), normal(8, 48, 40)

    def some(rows: slice) -> Any:
        out = fused.place(acc[rows])
        given = fused.place(np.ascontiguousarray(fired[:, rows]))
        fused.ffn(out, fused.place(x[rows]), given, layer.memory, layer.offsets(index), layer.bundle)
        return fused.fetch(out)

    assert same(np.concatenate([some(slice(0, 16)), some(slice(16, 48))]), some(slice(0, 48)))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_rows_that_are_not_finite_stay_theirs(fused) -> None:
    """A token that is no number spoils nothing but itself."""
    layer, index = Layer("f16", 60, 40, gated=True, bias=False), tiles_of(60)
    fired, x = fired_for(16, index, 1.0), normal(7, 16, 40)
    x[3, 5], x[9, 0] = np.nan, np.inf
    acc = fused.zeros(16, 40)
    fused.ffn(acc, fused.place(x), fused.place(fired), layer.memory, layer.offsets(index), layer.bundle)
    assert np.isfinite(fused.fetch(acc)).all(axis=1).tolist() == [t not in (3, 9) for t in range(16)]


# -- forms


def test_what_the_kernels_do_not_know_is_left_to_the_twin(fused, twin) -> None:
    layer = Layer(LLM_INT8, 50, 40, gated=True, bias=True)
    assert not triton_ffn.can_run(layer.bundle)
    assert same(run(fused, layer, 16), run(twin, layer, 16))


def test_the_unit_of_loads_is_what_offsets_and_bundles_share() -> None:
    form = form_of(Part(8, 64, "f16"), 4096)
    assert (form.align, form.at, form.units, form.halves) == (8, 8, 64, 1)
    assert form_of(Part(8, 64, "f16"), 4090).align == 2
    codes = form_of(Part(0, 133, "int4g64"), 1 << 20)
    assert (codes.align, codes.at, codes.units, codes.halves) == (16, 16, 80, 2)
    assert (codes.group, codes.groups, codes.kind, codes.base) == (32, 3, "counted", -8.0)


# -- whether they run


def test_a_reason_is_given_where_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_backend.why_not(DEVICE) is None

    def broken(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\n Please specify")

    monkeypatch.setattr(triton_ffn, "probe", broken)
    assert triton_backend.why_not(DEVICE) == "RuntimeError: Failed to find C compiler. Please specify"
