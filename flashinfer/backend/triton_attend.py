"""Attention over the cache in two Triton kernels, however long it is: `Backend.attend`.

    tiles    of a tile of keys, and the rows of a token or a tile of them that look at it: the largest score, the sum of
             the weights relative to it, and the weighted sum of the values. Some keys at a time, in order, what was
             summed before being scaled as a larger score appears (online softmax, arXiv 1805.02867, section 3)
    combine  of a row, all tiles it sees, relative to the largest score of all, with the sink if there is one

So tiles of keys, which FlashAttention takes one after the other (arXiv 2205.14135, section 3.1), run side by side, and
are added in a fixed order that begins at the first tile a row sees: neither capacity nor chunks, nor later keys, change
a bit. Query heads
that share keys read them once for one token. Keys and values are read in the codec they are kept in.

Compiled for sm_80, sm_89 and sm_90, and run in Triton's interpreter, never yet on a card.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashinfer.backend.base import Part, Scoring
from flashinfer.backend.torch_tiles import Kv
from flashinfer.backend.torch_weights import there
from flashinfer.backend.triton_codes import Form, check_placed, form_of, scales, stored, tables_of, values
from flashinfer.backend.triton_linear import Cut, added, products
from flashinfer.config import TILE_KEYS, TILE_TOKENS
from flashinfer.units import MIB

PARTIAL = 16 * MIB
"""Bytes of tiles' sums that wait to be combined; at least those of one tile of tokens."""
ONE, SOME = Cut(64, 64), Cut(16, 32)
"""Keys at once, and units of them, where a program has one row, and where it has several. Compiled for sm_80, sm_89 and
sm_90, no register is spilled at heads of 128 and 256 columns, 1, 2, 4 and 8 of which share their keys."""
TILES = 16
"""Tiles that are combined at once."""
ALL = 1 << 30
"""A window that nothing is beyond."""
_TILE = tl.constexpr(TILE_KEYS)


def fused_attend(q: Tensor, kv: Kv, first: int, heads: int, scoring: Scoring) -> Tensor:
    """As `Backend.attend`, everything on one device: float32 `q` `[tokens, heads * dim]`, contiguous and at a multiple
    of 16 bytes. On the current stream; nothing waits for the host. Takes `PARTIAL` bytes meanwhile."""
    check_placed(q, kv.k, kv.v)
    tokens, value_dim = len(q), kv.dims[1]
    out = torch.empty(tokens, heads * value_dim, device=q.device)
    step = 1 if tokens == 1 else TILE_TOKENS
    most = 4 * step * heads * (value_dim + 2) * (-(-(first + tokens) // TILE_KEYS))
    wave = max(1, PARTIAL // most) * step
    with torch.cuda.device_of(q):
        for t in range(0, tokens, wave):
            _attend(out[t : t + wave], q[t : t + wave], kv, first + t, step, scoring)
    return out


def _attend(out: Tensor, q: Tensor, kv: Kv, first: int, step: int, scoring: Scoring) -> None:
    """Some tiles of tokens, whose sums are within `PARTIAL`. Writes `out`."""
    (keys, vals), (dim, value_dim), kv_heads = _forms(kv), kv.dims, kv.k.shape[1]
    heads, window = q.shape[1] // dim, scoring.window or ALL
    low = max(0, first + 1 - window) // TILE_KEYS
    tiles, parts = (first + len(q) - 1) // TILE_KEYS + 1 - low, len(q) // step
    acc = torch.empty(parts * tiles * heads * step, value_dim, device=q.device)
    most, sums = (torch.empty(len(acc), device=q.device) for _ in range(2))
    slopes, sinks = _vectors(scoring, q.device)
    group = heads // kv_heads
    together, rows = (group, triton.next_power_of_2(group)) if step == 1 else (1, step)
    cut, columns = ONE if rows == 1 else SOME, triton.next_power_of_2(max(16, vals.units))
    units = keys.block(cut.units)
    _tiles_kernel[(heads // together, tiles, parts)](
        acc, most, sums, q, kv.k, kv.v, tables_of(Part(0, dim, kv.codec), q.device), slopes, first, low, window,
        scoring.softcap, keys, vals, kv.k.shape[3], kv.v.shape[3], heads, group, together, step, rows, cut.rows, units,
        keys.width(units), columns, vals.width(columns), enable_fp_fusion=False,
    )  # fmt: skip
    _combine_kernel[(len(q) * heads,)](
        out, acc, most, sums, sinks, first, low, window, tiles, heads, step, value_dim, columns, TILES,
        enable_fp_fusion=False,
    )  # fmt: skip


def _forms(kv: Kv) -> tuple[Form, Form]:
    """How a key lies, and a value."""
    (dim, value_dim), (size, value_size) = kv.dims, (kv.k.shape[3], kv.v.shape[3])
    return form_of(Part(0, dim, kv.codec), size), form_of(Part(0, value_dim, kv.codec), value_size)


@lru_cache(maxsize=512)
def _vectors(scoring: Scoring, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Slopes and sinks on the device."""
    slopes, sinks = (None if v is None else there(v, device) for v in (scoring.slopes, scoring.sinks))
    return slopes, sinks


def probe(device: torch.device) -> None:
    """Compile the kernels and run them on a few rows. Raises as `triton_ffn.probe` does."""
    kept = torch.ones(2, 1, TILE_KEYS, 16, device=device).half().view(torch.uint8)
    found = fused_attend(torch.ones(1, 16, device=device), Kv(kept, kept, "f16", (16, 16)), TILE_KEYS, 1, Scoring())
    if found.tolist() != [[1.0] * 16]:
        raise RuntimeError("attention is wrong")


@triton.jit(do_not_specialize=["first", "low", "window"])
def _tiles_kernel(
    acc, most, sums, q, keys, vals, tables, slopes, first, low, window, softcap, K: tl.constexpr, V: tl.constexpr,
    KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    TOGETHER: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, UNITS: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of keys for `TOGETHER` heads and `STEP` tokens: `ROWS` rows, of which those beyond repeat the last head.
    Writes `acc`, `most` and `sums`."""
    row, tile, begin = tl.arange(0, ROWS), low + tl.program_id(1), first + tl.program_id(2) * STEP
    if tile < _lowest(begin, window) or tile > begin // _TILE:
        return
    head = tl.program_id(0) * TOGETHER + tl.minimum(row // STEP, TOGETHER - 1)
    token = tl.program_id(2) * STEP + row % STEP
    back, kv_head = first + token - tile * _TILE, tl.program_id(0) * TOGETHER // GROUP
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total, out = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, tl.minimum(begin + STEP - tile * _TILE, _TILE), KEYS):
        key = at + tl.arange(0, KEYS)
        place, live = (tile.to(tl.int64) * (HEADS // GROUP) + kv_head) * _TILE + key, key >= 0
        score = products(q, token * HEADS + head, keys + place * KEY_BYTES, live, tables, K, UNITS, WIDTH)
        score = _scored(score * K.columns**-0.5, back[:, None] - key[None, :], head, slopes, window, softcap)
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        before, weight = tl.exp(top - base), tl.exp(score - base[:, None])
        rows = vals + place * VALUE_BYTES
        scale, zero = scales(rows, live, 0, tables, V, COLUMNS, VALUE_WIDTH)
        value = values(stored(rows, live, 0, V, COLUMNS, VALUE_WIDTH), scale, zero, 0, tables, V)
        total, out = total * before + tl.sum(weight, axis=1), added(out * before[:, None], weight, value)
        top = higher
    to = ((tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * HEADS + head) * STEP + row % STEP
    here, column = row // STEP < TOGETHER, tl.arange(0, COLUMNS)
    tl.store(most + to, top, mask=here)
    tl.store(sums + to, total, mask=here)
    tl.store(acc + to[:, None] * V.columns + column[None, :], out, mask=here[:, None] & (column < V.columns)[None, :])


@triton.jit
def _scored(score, back, head, slopes, window, softcap):
    """What becomes of scores `[rows, keys]` (`Scoring`), the key of each `back` positions back; minus infinity where a
    row does not see a key."""
    if softcap is not None:
        score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))  # tanh
    if slopes is not None:
        score -= tl.load(slopes + head)[:, None] * back
    return tl.where((back >= 0) & (back < window), score, -float("inf"))


@triton.jit
def _lowest(begin, window):
    """The first tile that a tile of tokens sees, which begins at that position."""
    return tl.maximum(begin + 1 - window, 0) // _TILE


@triton.jit(do_not_specialize=["first", "low", "window", "tiles"])
def _combine_kernel(
    out, acc, most, sums, sinks, first, low, window, tiles, HEADS: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr,
    COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One head of a token. Writes `out`."""
    token, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    part, column = token // STEP, tl.arange(0, COLUMNS)
    begin = first + part * STEP
    start, end = _lowest(begin, window) - low, begin // _TILE + 1 - low
    row = (part * tiles * HEADS + head) * STEP + token % STEP
    top = -float("inf") if sinks is None else tl.load(sinks + head)
    for at in range(start, end, TILES):
        tile = at + tl.arange(0, TILES)
        top = tl.maximum(top, tl.max(tl.load(most + row + tile * HEADS * STEP, tile < end, -float("inf"))))
    total = 0.0 if sinks is None else tl.exp(tl.load(sinks + head) - top)
    sum_ = tl.zeros([COLUMNS], tl.float32)
    for at in range(start, end, TILES):
        tile = at + tl.arange(0, TILES)
        place, here = row + tile * HEADS * STEP, tile < end
        share = tl.exp(tl.load(most + place, here, -float("inf")) - top)
        some = tl.load(acc + place[:, None] * DIM + column[None, :], here[:, None] & (column < DIM)[None, :], 0)
        total += tl.sum(share * tl.load(sums + place, here, 0))
        sum_ += tl.sum(share[:, None] * some, axis=0)
    tl.store(out + tl.program_id(0) * DIM + column, sum_ / total, mask=column < DIM)
