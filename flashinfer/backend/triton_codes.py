"""Rows of weights in Triton: what `quant.layout` says, for the kernels of `triton_ffn`.

A row is taken in *units*: a value of a plain codec, or a byte of codes, which is one column, or two of four bits
(columns i and i + 16 of a chunk of 32). So each byte is loaded once, and its columns are worked on one after the other.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from flashinfer.backend.base import Part
from flashinfer.quant import Codec, Grouped, Layout, codec_named
from flashinfer.quant.dynamic import TABLE
from flashinfer.quant.int8g32 import BLOCK, Int8g32
from flashinfer.quant.nested import GROUPS

VECTOR = 16
"""The widest load of a thread, in bytes; no alignment beyond it is of use."""
_PLAIN = ("f32", "f16", "bf16")
"""Codecs whose units are values."""
_BYTES = np.arange(256, dtype=np.uint8)
MAP = tl.constexpr(len(TABLE))
"""In `tables_of`, the values of scales that are quantised themselves, before those of codes."""
NESTED = tl.constexpr(GROUPS)


class Form(NamedTuple):
    """How one part of a bundle lies: what a kernel is compiled for. Offsets are bytes from the bundle's start.

    columns, units: of a row. at: the first unit. align: bundles and `at` lie at multiples of so many bytes.
    kind: what a unit is: "f32", "f16" or "bf16"; or codes, "signed" (bytes as integers), "counted" (the code plus
    `base`) or "table" (see `tables_of`). halves: columns of a unit.
    scale: how scales are stored, "none" of values. group: units that share one; 0: the row. zero: likewise, "none"
    where there are no zero-points. scales_at, zeros_at: the first of them. groups: of a row. factor: of every scale.
    """

    columns: int
    units: int
    at: int
    align: int
    kind: str
    halves: int = 1
    base: float = 0.0
    scale: str = "none"
    group: int = 0
    groups: int = 1
    scales_at: int = 0
    factor: float = 1.0
    zero: str = "none"
    zeros_at: int = 0

    def block(self, most: int) -> int:
        """Units to take at once: a power of two, so many at most, no less than a chunk."""
        return max(16, min(most, 1 << (self.units - 1).bit_length()))

    def width(self, block: int) -> int:
        """How many of the units of a block share a scale, of those that begin at a multiple of it."""
        return min(self.group, block) if self.group else block


def check_placed(*tensors: Tensor) -> None:
    """Whether tensors lie as the kernels were compiled for."""
    for tensor in tensors:
        assert tensor.is_contiguous(), "the kernels know no strides"
        assert tensor.data_ptr() % VECTOR == 0, "other addresses would be other kernels, and other bits"


def knows(codec: str | Codec) -> bool:
    """Whether the kernels know rows of a codec: all but the outliers of `LlmInt8`."""
    found = codec_named(codec) if isinstance(codec, str) else codec
    return found.name in _PLAIN or isinstance(found, Int8g32 | Grouped)


@cache
def form_of(part: Part, stride: int) -> Form:
    """The form of a part of bundles that lie at multiples of `stride` bytes. Before: `knows(part.codec)`."""
    codec = codec_named(part.codec) if isinstance(part.codec, str) else part.codec
    align, elements = gcd(VECTOR, stride, part.offset), part.elements
    assert align % 2 == 0, "rows of every codec have an even number of bytes"
    if codec.name in _PLAIN:
        return Form(elements, elements, part.offset, align, codec.name)
    if isinstance(codec, Int8g32):
        groups = -(-elements // BLOCK)
        return Form(
            elements, elements, part.offset + 2 * groups, gcd(align, 2 * groups), "signed",
            scale="f16", group=BLOCK, groups=groups, scales_at=part.offset,
        )  # fmt: skip
    assert isinstance(codec, Grouped), "not every codec is known"
    return _form_of_codes(codec.layout, part, align)


def _form_of_codes(layout: Layout, part: Part, align: int) -> Form:
    elements, halves = part.elements, 8 // layout.bits
    kind = "table"
    if np.array_equal(layout.table, _BYTES.view(np.int8)):
        kind = "signed"
    elif np.array_equal(layout.table, layout.table[0] + np.arange(len(layout.table))):
        kind = "counted"
    return Form(
        elements,
        elements if halves == 1 else layout.columns(elements) // 2,
        part.offset + layout.codes_at(elements),
        align,
        kind,
        halves,
        float(layout.table[0]),
        layout.scale,
        (layout.group or 0) // halves,
        layout.groups(elements),
        part.offset,
        layout.unit,
        layout.zero or "none",
        part.offset + layout.zeros_at(elements),
    )


def tables_of(part: Part, device: torch.device) -> Tensor:
    """What the kernels look up for a part, float32: the dynamic map, then, of codes, the value of each."""
    codec = codec_named(part.codec) if isinstance(part.codec, str) else part.codec
    return _tables(codec.layout if isinstance(codec, Grouped) else None, device)


@cache
def _tables(layout: Layout | None, device: torch.device) -> Tensor:
    values = TABLE if layout is None else np.concatenate([TABLE, layout.table])
    return torch.from_numpy(values).to(device)


@triton.jit
def columns(units, half: tl.constexpr, F: tl.constexpr):
    """The columns of those units, of each its first or second."""
    if F.halves == 2:
        units = units // 16 * 32 + units % 16 + 16 * half
    return units


@triton.jit
def stored(bundles, live, first, F: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr):
    """Units first .. first + UNITS of one part of bundles at addresses `[n]`, as they are stored `[n, UNITS / WIDTH,
    WIDTH]`; zeros where a bundle is not `live` or the row has ended."""
    unit = first + tl.arange(0, UNITS // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    here, unit = live[:, None, None] & (unit < F.units)[None, :, :], unit[None, :, :]
    rows = tl.multiple_of(bundles + F.at, F.align)[:, None, None]
    if F.kind == "f32" and F.align % 4 == 0:
        units = tl.load(rows.to(tl.pointer_type(tl.float32), bitcast=True) + unit, mask=here, other=0)
    elif F.kind == "f32":
        units = _float32(rows + 4 * unit, here, F.align)
    elif F.kind == "f16":
        units = tl.load(rows.to(tl.pointer_type(tl.float16), bitcast=True) + unit, mask=here, other=0)
    elif F.kind == "bf16":
        units = tl.load(rows.to(tl.pointer_type(tl.bfloat16), bitcast=True) + unit, mask=here, other=0)
    else:
        units = tl.load(rows + unit, mask=here, other=0)
    return units


@triton.jit
def scales(bundles, live, first, tables, F: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr):
    """Of the groups of those units, `[n, UNITS / WIDTH, 1]` each: scales as they are multiplied with, and zero-points
    as they are added; zeros where there are none."""
    group = tl.arange(0, UNITS // WIDTH)
    if F.group:
        group = (first + group * WIDTH) // F.group
    here, group = live[:, None] & (group < F.groups)[None, :], group[None, :]
    row = (bundles + F.scales_at)[:, None]
    if F.scale == "f16":
        scale = _float16(row + 2 * group, here)
    elif F.scale == "f32":
        scale = _float32(row + 4 * group, here, F.align)
    elif F.scale == "e8m0":  # the bits of the power of two; the smallest one is subnormal
        power = tl.load(row + group, mask=here, other=0).to(tl.int32) << 23
        scale = tl.maximum(power, 1 << 22).to(tl.float32, bitcast=True)
    elif F.scale == "nested":
        mean = _float32(row + 0 * group, here, F.align)
        largest = _float32(row + 4 + 4 * (group // NESTED), here, F.align)
        code = tl.load(row + 4 + 4 * ((F.groups + NESTED - 1) // NESTED) + group, mask=here, other=0)
        scale = tl.load(tables + code.to(tl.int32)) * largest + mean
    else:
        scale = tl.zeros([bundles.shape[0], UNITS // WIDTH], tl.float32)
    scale = scale * F.factor
    if F.zero == "f16":
        zero = _float16((bundles + F.zeros_at)[:, None] + 2 * group, here)
    elif F.zero == "u8":
        zero = -tl.load((bundles + F.zeros_at)[:, None] + group, mask=here, other=0).to(tl.float32) * scale
    else:
        zero = tl.zeros_like(scale)
    return scale[:, :, None], zero[:, :, None]


@triton.jit
def values(units, scale, zero, half: tl.constexpr, tables, F: tl.constexpr):
    """What `stored` units mean, with the bits of the codec's `decode`, in float32: the first or second column of
    each, `[n, UNITS]`."""
    if F.halves == 2:
        units = units >> 4 * half & 15
    if F.kind == "signed":
        found = units.to(tl.int8, bitcast=True).to(tl.float32)
    elif F.kind == "counted":
        found = units.to(tl.float32) + F.base
    elif F.kind == "table":
        found = tl.load(tables + MAP + units.to(tl.int32))
    else:
        found = units.to(tl.float32)
    if F.scale != "none":
        found = found * scale
    if F.zero != "none":
        found = found + zero
    return tl.reshape(found, [found.shape[0], found.shape[1] * found.shape[2]])


@triton.jit
def _float16(at, here):
    """The float16 values at byte addresses, in float32."""
    return tl.load(at.to(tl.pointer_type(tl.float16), bitcast=True), mask=here, other=0).to(tl.float32)


@triton.jit
def _float32(at, here, ALIGN: tl.constexpr):
    """The float32 values at byte addresses, which may be even ones: behind 16-bit values they start anywhere."""
    if ALIGN % 4 == 0:
        found = tl.load(at.to(tl.pointer_type(tl.float32), bitcast=True), mask=here, other=0)
    else:
        halves = at.to(tl.pointer_type(tl.uint16), bitcast=True)
        low = tl.load(halves, mask=here, other=0).to(tl.uint32)
        high = tl.load(halves + 1, mask=here, other=0).to(tl.uint32)
        found = (low | (high << 16)).to(tl.float32, bitcast=True)
    return found
