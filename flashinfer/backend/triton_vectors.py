"""The small verbs between products, one Triton kernel each: norms, rotary positions, and what is added to the cache.

Torch takes a launch for each operation of theirs, five to seven, which for one token costs more than the arithmetic.
What they write has the bits that torch gives it, but for norms, whose sums have an order of their own; a program norms
one row alone.

Compiled for sm_80, sm_89 and sm_90, and run in Triton's interpreter, never yet on a card.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashinfer.backend.torch_tiles import Kv
from flashinfer.backend.torch_weights import DTYPES
from flashinfer.backend.triton_codes import check_placed
from flashinfer.config import TILE_KEYS

BLOCK = 2048
"""Values of a row that a program takes at once."""
_TILE = tl.constexpr(TILE_KEYS)


def fused_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: Literal["rms", "layer"], eps: float, size: int
) -> Tensor:
    """As `Backend.norm`: float32 `x` `[tokens, width]`, contiguous, on the current stream."""
    check_placed(x)
    out, block = torch.empty_like(x), min(BLOCK, triton.next_power_of_2(size))
    with torch.cuda.device_of(x):
        _norm_kernel[(x.numel() // size,)](
            out, x, weight, bias, eps, size, kind == "layer", block, enable_fp_fusion=False
        )
    return out


def fused_rotate(x: Tensor, head_dim: int, cos: Tensor, sin: Tensor, first: int) -> Tensor:
    """As `Backend.rotate`: float32 `x` `[tokens, heads * head_dim]` and tables contiguous, on the current stream."""
    check_placed(x, cos, sin)
    (tokens, width), out = x.shape, torch.empty_like(x)
    block = min(BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        _rotate_kernel[(tokens, triton.cdiv(width, block))](
            out, x, cos, sin, first, width, head_dim, cos.shape[1], block, enable_fp_fusion=False
        )
    return out


def can_append(kv: Kv) -> bool:
    """Whether the kernel keeps keys and values as that cache does: as plain numbers."""
    return kv.codec in DTYPES


def fused_append(kv: Kv, at: int, k: Tensor, v: Tensor, skip: int, count: int) -> None:
    """As `Backend.append_kv`: float32 `k` and `v` contiguous, on the current stream. Before: `can_append(kv)`. Writes
    `kv`."""
    kept, heads = [x.view(DTYPES[kv.codec]) for x in (kv.k, kv.v)], kv.k.shape[1]
    block = min(BLOCK, triton.next_power_of_2(heads * max(kv.dims)))
    with torch.cuda.device_of(k):
        _append_kernel[(count,)](*kept, k, v, at, skip, heads, *kv.dims, block, enable_fp_fusion=False)


def probe(device: torch.device) -> None:
    """Compile the kernels and run them on a row. Raises as `triton_ffn.probe` does."""
    ones = torch.ones(1, 16, device=device)
    x = fused_norm(ones, ones[0], None, "rms", 0.0, 16)
    zeros, ones = torch.zeros(4, 8, device=device), torch.ones(4, 8, device=device)
    x = fused_rotate(x, 16, zeros, ones, 3)
    kept = torch.zeros(1, 1, TILE_KEYS, 32, dtype=torch.uint8, device=device)
    fused_append(Kv(kept, kept, "f16", (16, 16)), 3, x, x, 0, 1)
    if kept.view(torch.float16)[0, 0, 3].tolist() != [-1.0] * 8 + [1.0] * 8:
        raise RuntimeError("a row that is normed, turned and kept is wrong")


@triton.jit
def _norm_kernel(out, x, weight, bias, eps, SIZE: tl.constexpr, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """A row. Writes `out`."""
    start, lane = tl.program_id(0).to(tl.int64) * SIZE, tl.arange(0, BLOCK)
    mean = 0.0
    if LAYER:
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, SIZE, BLOCK):
            sums += tl.load(x + start + first + lane, mask=first + lane < SIZE, other=0)
        mean = tl.sum(sums) / SIZE
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, SIZE, BLOCK):
        here = first + lane < SIZE
        off = tl.where(here, tl.load(x + start + first + lane, mask=here, other=0) - mean, 0.0)
        sums += off * off
    scale = tl.rsqrt(tl.sum(sums) / SIZE + eps)
    for first in range(0, SIZE, BLOCK):
        column, here = first + lane, first + lane < SIZE
        found = (tl.load(x + start + column, mask=here, other=0) - mean) * scale
        if weight is not None:
            found *= tl.load(weight + column, mask=here, other=0)
        if bias is not None:
            found += tl.load(bias + column, mask=here, other=0)
        tl.store(out + start + column, found, mask=here)


@triton.jit(do_not_specialize=["first"])
def _rotate_kernel(
    out, x, cos, sin, first, WIDTH: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Some columns of a token. Writes `out`."""
    column, token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.program_id(0)
    within, start = column % DIM, token.to(tl.int64) * WIDTH
    here, low = column < WIDTH, within < HALF
    turned = here & (within < 2 * HALF)
    angle = (first + token) * HALF + tl.where(low, within, within - HALF)
    mine = tl.load(x + start + column, mask=here, other=0)
    other = tl.load(x + start + tl.where(low, column + HALF, column - HALF), mask=turned, other=0)
    straight = mine * tl.load(cos + angle, mask=turned, other=0)
    across = other * tl.load(sin + angle, mask=turned, other=0)
    found = tl.where(low, straight - across, straight + across)
    tl.store(out + start + column, tl.where(turned, found, mine), mask=here)


@triton.jit(do_not_specialize=["at", "skip"])
def _append_kernel(
    keys, vals, k, v, at, skip, HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """All heads' keys and values of one position. Writes `keys` and `vals`."""
    row, position = (skip + tl.program_id(0)).to(tl.int64), at + tl.program_id(0)
    tile, within = (position // _TILE).to(tl.int64) * HEADS, position % _TILE
    _keep(keys, k + row * HEADS * KEY, tile, within, HEADS, KEY, BLOCK)
    _keep(vals, v + row * HEADS * VALUE, tile, within, HEADS, VALUE, BLOCK)


@triton.jit
def _keep(kept, row, tile, within, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A row `[HEADS, DIM]` as the position `within` of the heads' tiles from `tile` on. Writes `kept`."""
    for first in range(0, HEADS * DIM, BLOCK):
        column = first + tl.arange(0, BLOCK)
        to, here = ((tile + column // DIM) * _TILE + within) * DIM + column % DIM, column < HEADS * DIM
        tl.store(kept + to, tl.load(row + column, mask=here).to(kept.dtype.element_ty), mask=here)
