"""The sparse feed-forward in three Triton kernels, on bundles where they lie: `Backend.ffn` for a device's memory.

Nothing is gathered: a kernel adds a neuron's byte offset to the memory's address and reads its rows there, in the
codec they have. Neurons that fire zero for all of a tile of tokens are not read.

    coefficients   what is taken of each down row: fired * up activation(up row . x + bias), a few neurons to a program
    outputs        of each tile of neurons, coefficients @ down rows, some columns to a program
    fold           acc + outputs of the first tile + of the second ...

So sums have the order of the torch twin, tile by tile, however tiles are grouped into calls. No kernel uses atomics,
none is tuned by timing, and all are compiled for the form of a bundle alone, never for the number of tokens or tiles:
the same bytes give the same bits in every run on the same card and versions. Products are rounded before they are
added where a codec's `decode` does so.

They were compiled for sm_80, sm_89 and sm_90, and run in Triton's interpreter, never yet on a card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashinfer.backend.base import Bundle, Part
from flashinfer.backend.triton_codes import check_placed, columns, form_of, knows, scales, stored, tables_of, values
from flashinfer.backend.triton_linear import Cut, added, cut_of, products, single
from flashinfer.config import TILE_NEURONS, TILE_TOKENS
from flashinfer.units import MIB

PARTIAL = 16 * MIB
"""Bytes of tiles' outputs that wait to be added; at least those of one tile."""


ONE, SOME = Cut(TILE_NEURONS, 128), Cut(16, 64)
"""Down rows at once, and units of them, for one token and for a tile of them. No register is spilled, compiled as
`triton_linear` says."""
FOLD = 1024
"""Values of an output that a program adds up."""
_TILE = tl.constexpr(TILE_NEURONS)


def can_run(bundle: Bundle) -> bool:
    """Whether the kernels know all codecs of such bundles."""
    return all(p is None or knows(p.codec) for p in (bundle.down, bundle.up, bundle.up_bias))


def fused_ffn(acc: Tensor, x: Tensor, fired: Tensor, memory: Tensor, offsets: Tensor, bundle: Bundle) -> None:
    """As `Backend.ffn`, everything on one device: float32 `acc` `[tokens, hidden]`, `x` `[tokens, width]` and `fired`
    `[tiles, tokens, TILE_NEURONS]`, uint8 `memory` `[bytes]`, int64 `offsets` `[tiles, TILE_NEURONS]`.

    Mutates `acc`, on the current stream; nothing waits for the host, and a CUDA graph can hold it once the kernels are
    compiled. Before: `can_run(bundle)`; all are contiguous, begin at multiples of 16 bytes and hold fewer than 2^31
    values, but for `memory`; offsets of neurons that fire are multiples of gcd(16, bundle.bytes), and their bundles lie
    within `memory`. Takes at most `PARTIAL` bytes (or a tile's outputs) and the size of `fired` meanwhile.
    """
    if not acc.numel() or not offsets.numel():
        return
    check_placed(acc, x, fired, memory, offsets)
    with torch.cuda.device_of(acc):
        if bundle.up is not None:
            fired = _coefficients(x, fired, memory, offsets, bundle)
        wave = max(1, PARTIAL // (4 * acc.numel()))
        for first in range(0, len(offsets), wave):
            _add(acc, fired[first : first + wave], memory, offsets[first : first + wave], bundle)


def probe(device: torch.device) -> None:
    """Compile the kernels and run them on one neuron. Raises what goes wrong: whatever Triton, its compiler or the
    driver raises, RuntimeError where the result is wrong."""
    ones = torch.ones(1, 16, device=device)
    bundle = Bundle(64, Part(32, 16, "bf16"), Part(0, 16, "bf16"))
    fired = torch.zeros(1, 1, TILE_NEURONS, device=device).index_fill_(2, torch.tensor([5], device=device), 0.5)
    offsets, acc = torch.zeros(1, TILE_NEURONS, dtype=torch.int64, device=device), torch.zeros(1, 16, device=device)
    fused_ffn(acc, ones, fired, ones.bfloat16().repeat(1, 2).view(torch.uint8).view(-1), offsets, bundle)
    if acc.tolist() != [[8.0] * 16]:
        raise RuntimeError("a neuron's output is wrong")


def _coefficients(x: Tensor, fired: Tensor, memory: Tensor, offsets: Tensor, bundle: Bundle) -> Tensor:
    """What is taken of each down row, as `fired`."""
    assert bundle.up is not None
    out, tokens = torch.empty_like(fired), fired.shape[1]
    form = form_of(bundle.up, bundle.bytes)
    bias = None if bundle.up_bias is None else form_of(bundle.up_bias, bundle.bytes)
    step, cut = cut_of(tokens)
    units = form.block(cut.units)
    _coefficients_kernel[(TILE_NEURONS // cut.rows, len(offsets), tokens // step)](
        out, x, fired, memory, offsets, tables_of(bundle.up, memory.device), tokens, form, bias,
        bundle.up_activation, step, cut.rows, units, form.width(units), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _add(acc: Tensor, taken: Tensor, memory: Tensor, offsets: Tensor, bundle: Bundle) -> None:
    """Add some tiles of neurons, whose outputs are within `PARTIAL`. Writes `acc`."""
    form, (tokens, hidden) = form_of(bundle.down, bundle.bytes), acc.shape
    parts = torch.empty(len(offsets), tokens, hidden, device=acc.device)
    step, cut = (1, ONE) if tokens == 1 else (TILE_TOKENS, SOME)
    units = form.block(cut.units)
    _outputs_kernel[(triton.cdiv(form.units, units), len(offsets), tokens // step)](
        parts, taken, memory, offsets, tables_of(bundle.down, memory.device), tokens, form,
        step, cut.rows, units, form.width(units), enable_fp_fusion=False,
    )  # fmt: skip
    _fold_kernel[(triton.cdiv(acc.numel(), FOLD),)](acc, parts, len(offsets), acc.numel(), FOLD, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["tokens"])
def _coefficients_kernel(
    out, x, fired, memory, offsets, tables, tokens, F: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, NEURONS: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some neurons of a tile, for one token or a tile of them. Writes `out`."""
    neuron = tl.program_id(1) * _TILE + tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    tile, within = neuron // _TILE, neuron % _TILE
    at = (tile[None, :] * tokens + token[:, None]) * _TILE + within[None, :]
    share = tl.load(fired + at)
    live = tl.max((share != 0).to(tl.int32), axis=0) > 0
    bundles = memory + tl.load(offsets + neuron)
    sums = products(x, token, bundles, live, tables, F, UNITS, WIDTH)
    if BIAS is not None:
        sums += single(bundles, live, tables, BIAS)
    if ACTIVATION == "relu":
        sums = tl.where(sums < 0, 0.0, sums)
    elif ACTIVATION == "clamped":
        sums = tl.where(sums > 7.0, 7.0, tl.where(sums < -7.0, -7.0, sums)) + 1.0
    tl.store(out + at, tl.where(share != 0, share * sums, 0.0))


@triton.jit(do_not_specialize=["tokens"])
def _outputs_kernel(
    parts, taken, memory, offsets, tables, tokens, F: tl.constexpr, TOKENS: tl.constexpr, NEURONS: tl.constexpr,
    UNITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some columns of a tile's outputs, for one token or a tile of them. Writes `parts`."""
    tile, first = tl.program_id(1), tl.program_id(0) * UNITS
    row = tile * tokens + tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    low, high = tl.zeros([TOKENS, UNITS], tl.float32), tl.zeros([TOKENS, UNITS], tl.float32)
    for begin in range(0, _TILE, NEURONS):
        neuron = begin + tl.arange(0, NEURONS)
        share = tl.load(taken + row[:, None] * _TILE + neuron[None, :])
        live = tl.max((share != 0).to(tl.int32), axis=0) > 0
        bundles = tl.multiple_of(memory + tl.load(offsets + tile * _TILE + neuron), F.align)
        units = stored(bundles, live, first, F, UNITS, WIDTH)
        scale, zero = scales(bundles, live, first, tables, F, UNITS, WIDTH)
        low = added(low, share, values(units, scale, zero, 0, tables, F))
        if F.halves == 2:
            high = added(high, share, values(units, scale, zero, 1, tables, F))
    _store(parts, row, first, low, 0, F)
    if F.halves == 2:
        _store(parts, row, first, high, 1, F)


@triton.jit
def _store(parts, row, first, sums, half: tl.constexpr, F: tl.constexpr):
    """Sums `[tokens, units]` to the columns of those units. Writes `parts`."""
    column = columns(first + tl.arange(0, sums.shape[1]), half, F)
    mask = tl.broadcast_to((column < F.columns)[None, :], sums.shape)
    tl.store(parts + row[:, None] * F.columns + column[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=["tiles", "size"])
def _fold_kernel(acc, parts, tiles, size, VALUES: tl.constexpr):
    """acc += parts `[tiles, size]`, one tile after the other. Writes `acc`."""
    at = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    here = at < size
    sums = tl.load(acc + at, mask=here)
    for tile in range(tiles):
        sums += tl.load(parts + tile * size + at, mask=here)
    tl.store(acc + at, sums, mask=here)
