"""How a row of codes lies: its scales, its zero-points, its codes. Every codec of codes but `int8g32` has this form.

    scales | zero-points, of a codec that has them | zeros up to a multiple of 16 | codes | zeros up to a multiple of 16

Codes of eight bits are bytes in the order of the columns. Codes of four bits lie in chunks of 16 bytes for 32 columns,
whatever the group, as in ggml: byte i of a chunk has the code of column i in its low half and that of column i + 16 in
its high half. Codes beyond the last column are 0. So codes begin and rows end at multiples of 16 bytes from the row's
start, and a chunk decodes with one load, a mask and a shift.

A value is `table[code] * scale` in float32, rounded once; with zero-points `table[code] * scale + zero`, where the
product is exact, so that a fused multiply-add gives the same bits. A zero-point is a float16, or -z times the scale for
an integer z, one byte: that product is exact, too, and so is the sum, `(table[code] - z) * scale`. A scale is what is
stored, converted exactly (float16, e8m0) or as `nested` says, times `unit`, rounded once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from flashinfer.quant.nested import nested_bytes, nested_scales

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
ScaleType = Literal["f16", "f32", "e8m0", "nested"]
ZeroType = Literal["f16", "u8"]

ALIGNMENT = 16
"""Codes begin and rows end at multiples of so many bytes."""
CHUNK = 32
"""Columns of 16 bytes of four-bit codes."""


def half_scales(raw: Bytes) -> F32:
    """Little-endian float16 `[n, 2 * groups]` bytes -> `[n, groups]`, exact."""
    return raw.view("<f2").astype(np.float32)


def single_scales(raw: Bytes) -> F32:
    """Little-endian float32 `[n, 4 * groups]` bytes -> `[n, groups]`, as they are."""
    return raw.view("<f4").astype(np.float32, copy=False)


def power_scales(raw: Bytes) -> F32:
    """e8m0 bytes e `[n, groups]` -> 2 ** (e - 127), exact (OCP Microscaling Formats 1.0, 5.4.1). 255, a NaN, is never
    written."""
    return np.ldexp(np.float32(1), raw.astype(np.int32) - 127)


_SCALES: dict[ScaleType, tuple[Callable[[int], int], Callable[[Bytes], F32]]] = {
    "f16": (lambda groups: 2 * groups, half_scales),
    "f32": (lambda groups: 4 * groups, single_scales),
    "e8m0": (lambda groups: groups, power_scales),
    "nested": (nested_bytes, nested_scales),
}
"""Of each type of scale: the bytes of so many, and what they mean."""
_ZEROS: dict[ZeroType | None, int] = {None: 0, "f16": 2, "u8": 1}
"""Bytes of a zero-point."""


@dataclass(frozen=True, eq=False)
class Layout:
    """All a kernel must know of a codec.

    bits: of a code, 4 or 8. group: columns that share a scale, a multiple of 32; None: the whole row.
    table: float32 `[2 ** bits]`, the value of each code before its scale. scale: how scales are stored.
    unit: what a stored scale is multiplied by. zero: the type of each group's zero-point, behind all scales; integers
    of a byte lie within what the table holds. None: there are none.
    """

    bits: Literal[4, 8]
    group: int | None
    table: F32
    scale: ScaleType
    unit: float = 1.0
    zero: ZeroType | None = None

    def groups(self, elements: int) -> int:
        """Groups of a row, a shorter last one included."""
        return 1 if self.group is None else -(-elements // self.group)

    def zeros_at(self, elements: int) -> int:
        """Offset of the first zero-point: the bytes of all scales."""
        return _SCALES[self.scale][0](self.groups(elements))

    def codes_at(self, elements: int) -> int:
        """Offset of the first code."""
        return _padded(self.zeros_at(elements) + _ZEROS[self.zero] * self.groups(elements))

    def row_bytes(self, elements: int) -> int:
        """Bytes of a row."""
        return self.codes_at(elements) + self.columns(elements) * self.bits // 8

    def columns(self, elements: int) -> int:
        """Columns that codes are stored for: those of a row in whole 16 bytes."""
        return -(-elements // self._unit) * self._unit

    def elements(self, row_bytes: int) -> int:
        """The most columns that a row of so many bytes can have."""
        units = range(row_bytes // ALIGNMENT + 1)
        return self._unit * (bisect_right(units, row_bytes, key=lambda n: self.row_bytes(n * self._unit)) - 1)

    def scales(self, data: Bytes, elements: int) -> F32:
        """Scales `[n, groups]` of rows `[n, bytes]`, as they are multiplied with."""
        raw = np.ascontiguousarray(data[:, : self.zeros_at(elements)])
        return _SCALES[self.scale][1](raw) * np.float32(self.unit)

    def zeros(self, data: Bytes, elements: int) -> F32:
        """Zero-points `[n, groups]` of rows `[n, bytes]`, as they are added, of a layout that has them."""
        at = self.zeros_at(elements)
        raw = np.ascontiguousarray(data[:, at : at + _ZEROS[self.zero] * self.groups(elements)])
        return half_scales(raw) if self.zero == "f16" else -raw.astype(np.float32) * self.scales(data, elements)

    def codes(self, data: Bytes, elements: int) -> Bytes:
        """Codes `[n, elements]` of rows `[n, bytes]`, one to a byte."""
        stored = data[:, self.codes_at(elements) :]
        return stored[:, :elements] if self.bits == 8 else unpacked(stored)[:, :elements]

    def rows(self, before: Bytes, codes: Bytes) -> Bytes:
        """Rows `[n, bytes]` of what lies before the codes `[n, scales and zero-points]` and codes `[n, elements]`."""
        data = np.zeros((len(codes), self.row_bytes(codes.shape[1])), dtype=np.uint8)
        data[:, : before.shape[1]] = before
        self.write_codes(data, codes)
        return data

    def write_codes(self, data: Bytes, codes: Bytes) -> None:
        """Put codes `[n, elements]`, one to a byte, in their places in rows `[n, bytes]`. Writes `data`."""
        elements = codes.shape[1]
        stored = np.zeros((len(codes), self.columns(elements)), dtype=np.uint8)
        stored[:, :elements] = codes
        data[:, self.codes_at(elements) :] = stored if self.bits == 8 else packed(stored)

    @property
    def _unit(self) -> int:
        """Columns whose codes take 16 bytes."""
        return 8 * ALIGNMENT // self.bits


def packed(codes: Bytes) -> Bytes:
    """Codes of four bits, one to a byte, `[n, columns]`, whole chunks -> `[n, columns / 2]`, as the module says."""
    halves = codes.reshape(len(codes), codes.shape[1] // CHUNK, 2, CHUNK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)).reshape(len(codes), codes.shape[1] // 2)


def unpacked(data: Bytes) -> Bytes:
    """The inverse of `packed`."""
    chunks = data.reshape(len(data), data.shape[1] // ALIGNMENT, 1, ALIGNMENT)
    return np.concatenate([chunks & np.uint8(15), chunks >> np.uint8(4)], axis=2).reshape(len(data), 2 * data.shape[1])


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
