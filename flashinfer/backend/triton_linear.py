"""Products with rows of weights in Triton: `Backend.linear` and `Backend.decide`, one kernel each, and the part of a
kernel that they share with the feed-forward.

A matrix's rows lie one after the other, those of a decision matrix that is in the bundles wherever their offsets say.
Either way a program takes a few rows, for one token or a tile of them, and reads them in the codec they have.

The order of a sum is written out, so neither the place of a row, nor the rows and tokens beside it, nor how the
compiler lays out a block can change a bit. For one token, each of `Cut.units` lanes adds every so many-th unit of the
row in turn, and neighbouring lanes are added until one is left; for a tile of tokens, a product has its terms one after
the other. So `decide` has the bits of `linear`, though bundles are aligned otherwise than rows of a matrix.

Compiled for sm_80, sm_89 and sm_90, and run in Triton's interpreter, never yet on a card.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashinfer.backend.base import Bundle, Part
from flashinfer.backend.torch_weights import Matrix
from flashinfer.backend.triton_codes import check_placed, columns, form_of, scales, stored, tables_of, values
from flashinfer.config import TILE_NEURONS, TILE_TOKENS


class Cut(NamedTuple):
    """How much a program takes, powers of two: rows (at most TILE_NEURONS), and units of them at once. With other units
    results have other bits."""

    rows: int
    units: int


ONE, SOME = Cut(4, 1024), Cut(16, 32)
"""For one token, and for a tile of them. A row's programs suffice to keep a card busy: a matrix of 4096 rows has 1024
of them for a token, each with 16 bytes of every row under way in every thread. Compiled for sm_80, sm_89 and sm_90 at
4096 columns, f16, bf16, int8 and nf4 spill no register, and other codecs at most 8 bytes."""


def cut_of(tokens: int) -> tuple[int, Cut]:
    """How many tokens a program takes, and its cut."""
    return (1, ONE) if tokens == 1 else (TILE_TOKENS, SOME)


def fused_linear(out: Tensor, first: int, x: Tensor, weights: Matrix) -> None:
    """As `Backend.linear`, everything on one device: float32 `out` `[tokens, width]` and `x` `[tokens, cols]`.

    Mutates `out`, on the current stream; nothing waits for the host, and a CUDA graph can hold it once the kernel is
    compiled. Before: the kernels know the codec; all are contiguous and begin at multiples of 16 bytes, `out` and `x`
    hold fewer than 2^31 values.
    """
    (rows, cols), (tokens, width), stride = weights.shape, out.shape, weights.raw.shape[1]
    part = Part(0, cols, weights.codec)
    form = form_of(part, stride)
    step, cut = cut_of(tokens)
    units = form.block(cut.units)
    check_placed(out, x, weights.raw)
    with torch.cuda.device_of(out):
        _linear_kernel[(triton.cdiv(rows, cut.rows) * (tokens // step),)](
            out, x, weights.raw, tables_of(part, out.device), first, rows, width, tokens // step, form, stride,
            step, cut.rows, units, form.width(units), enable_fp_fusion=False,
        )  # fmt: skip


def fused_decide(gate: Tensor, x: Tensor, index: Tensor, memory: Tensor, offsets: Tensor, bundle: Bundle) -> None:
    """As `Backend.decide`, everything on one device: float32 `gate` `[tokens, neurons]` and `x` `[tokens, width]`,
    int64 `index` and `offsets` `[tiles, TILE_NEURONS]`, uint8 `memory` `[bytes]`.

    Mutates `gate`, as `fused_linear` does. Before: the kernels know its codecs; offsets of neurons that are named are
    multiples of gcd(16, bundle.bytes), and their bundles lie within `memory`, which begins at a multiple of 16.
    """
    if not index.numel():
        return
    assert bundle.decision is not None
    form = form_of(bundle.decision, bundle.bytes)
    bias = None if bundle.decision_bias is None else form_of(bundle.decision_bias, bundle.bytes)
    tokens, neurons = gate.shape
    step, cut = cut_of(tokens)
    units = form.block(cut.units)
    check_placed(gate, x, index, memory, offsets)
    with torch.cuda.device_of(gate):
        _decide_kernel[(index.numel() // cut.rows * (tokens // step),)](
            gate, x, index, memory, offsets, tables_of(bundle.decision, gate.device), neurons, tokens // step, form,
            bias, step, cut.rows, units, form.width(units), enable_fp_fusion=False,
        )  # fmt: skip


def probe(device: torch.device) -> None:
    """Compile the kernels and run them on a few rows. Raises as `triton_ffn.probe` does."""
    x = torch.ones(1, 16, device=device)
    rows = torch.arange(3, device=device).bfloat16()[:, None].repeat(1, 16).view(torch.uint8)
    out, part = torch.zeros(1, 3, device=device), Part(0, 16, "bf16")
    fused_linear(out, 0, x, Matrix(rows, "bf16", 16))
    index = torch.full((1, TILE_NEURONS), -1, device=device)
    index[0, 5] = 2
    fused_decide(out, x, index, rows.view(-1), index.clamp(min=0) * 32, Bundle(32, part, decision=part))
    if out.tolist() != [[0.0, 16.0, 64.0]]:
        raise RuntimeError("a product is wrong")


@triton.jit(do_not_specialize=["first", "rows", "width", "tiles"])
def _linear_kernel(
    out, x, memory, tables, first, rows, width, tiles, F: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some rows of a matrix, for one token or a tile of them; those tiles of tokens are next to each other that share
    rows. Writes `out`."""
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    live = row < rows
    sums = products(x, token, memory + row.to(tl.int64) * STRIDE, live, tables, F, UNITS, WIDTH)
    tl.store(out + token[:, None] * width + first + row[None, :], sums, mask=live[None, :])


@triton.jit(do_not_specialize=["neurons", "tiles"])
def _decide_kernel(
    gate, x, index, memory, offsets, tables, neurons, tiles, F: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some of the neurons that `index` names, for one token or a tile of them. Writes `gate`."""
    place = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    neuron = tl.load(index + place)
    live, bundles = neuron >= 0, memory + tl.load(offsets + place)
    sums = products(x, token, bundles, live, tables, F, UNITS, WIDTH)
    if BIAS is not None:
        sums += single(bundles, live, tables, BIAS)
    at, here = gate + token[:, None] * neurons + neuron[None, :], tl.broadcast_to(live[None, :], sums.shape)
    tl.store(at, tl.load(at, mask=here, other=0) + sums, mask=here)


@triton.jit
def products(x, token, rows, live, tables, F: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr):
    """x `[.., columns]` of those tokens times the rows at those addresses, `[tokens, rows]`; zeros for a row that is
    not `live`, which is not read."""
    TOKENS: tl.constexpr = token.shape[0]
    ROWS: tl.constexpr = rows.shape[0]
    rows = tl.multiple_of(rows, F.align)
    sums = tl.zeros([ROWS, UNITS] if TOKENS == 1 else [TOKENS, ROWS], tl.float32)
    for first in range(0, F.units, UNITS):
        units = stored(rows, live, first, F, UNITS, WIDTH)
        scale, zero = scales(rows, live, first, tables, F, UNITS, WIDTH)
        for half in tl.static_range(F.halves):
            found = values(units, scale, zero, half, tables, F)
            column = columns(first + tl.arange(0, UNITS), half, F)
            given = tl.load(
                x + token[:, None] * F.columns + column[None, :], mask=(column < F.columns)[None, :], other=0
            )
            if TOKENS == 1:
                sums = tl.fma(found, tl.broadcast_to(given, [ROWS, UNITS]), sums)
            else:
                sums = tl.dot(given, tl.trans(found), sums, input_precision="ieee")
    if TOKENS == 1:
        sums = _folded(sums)
    return sums


@triton.jit
def _folded(sums):
    """The sums of rows `[n, 2^k]` as `[1, n]`: of neighbours, then of those, and so on."""
    for _ in tl.static_range(_log2(sums.shape[1])):
        even, odd = tl.split(tl.reshape(sums, [sums.shape[0], sums.shape[1] // 2, 2]))
        sums = even + odd
    return tl.reshape(sums, [1, sums.shape[0]])


@triton.constexpr_function
def _log2(power: int) -> int:
    return power.bit_length() - 1


@triton.jit
def single(bundles, live, tables, F: tl.constexpr):
    """The one value of a part of bundles, `[1, n]`."""
    return tl.reshape(values(stored(bundles, live, 0, F, 1, 1), 0, 0, 0, tables, F), [1, bundles.shape[0]])


@triton.jit
def added(sums, share, rows):
    """sums `[tokens, columns]` + share `[tokens, neurons]` @ rows `[neurons, columns]`."""
    if share.shape[0] == 1:
        sums += tl.sum(tl.reshape(share, [rows.shape[0], 1]) * rows, axis=0)[None, :]
    else:
        sums = tl.dot(share, rows, sums, input_precision="ieee")
    return sums
