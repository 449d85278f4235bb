"""`int4g32`, `int4g64`, `int4g128`: four-bit integers with a scale for each group of so many columns; those with a `z`
behind the name have a zero-point too.

Without: codes are 0 .. 15 for the integers -8 .. 7, and a value is its integer times the scale, f16, exact in float32.
The scale is the one of least magnitude, rounded away from zero, that keeps all integers within their range; it is
negative where the largest magnitude is that of a positive value, for which -8 reaches further than 7. The error is at
most half a scale.

With: codes are 0 .. 15, and a value is `code * scale + zero`, rounded once. The zero-point is the least of the group,
the scale a fifteenth of what lies above it, taken in float64; both are f16, the one rounded down and the other up. The
error is at most half a scale, and a rounding.

An integer is the quotient in float32, rounded to nearest even. Scales and zero-points reach to 65504.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.quant.grouped import Grouped, spread
from flashinfer.quant.layout import Layout

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

GROUPS: Final = (32, 64, 128)
_SIGNED: Final = np.arange(-8, 8, dtype=np.float32)
_UNSIGNED: Final = np.arange(16, dtype=np.float32)


def _symmetric(rows: F32, group: int) -> tuple[Bytes, Bytes]:
    least, most = _extremes(rows, group)
    straight = np.maximum(most / 7, -least / 8)
    turned = np.maximum(-least / 7, most / 8)
    scales = _half(np.minimum(straight, turned), up=True)
    scales = np.where(turned < straight, -scales, scales)
    integers = np.rint(rows / spread(_divisors(scales), group, rows.shape[1]))
    return _bytes(scales), (integers + 8).astype(np.uint8)


def _asymmetric(rows: F32, group: int) -> tuple[Bytes, Bytes]:
    least, most = _extremes(rows, group)
    zeros = _half(least, up=False)
    scales = _half((most - zeros) / 15, up=True)
    above = rows - spread(zeros.astype(np.float32), group, rows.shape[1])
    codes = np.minimum(np.rint(above / spread(_divisors(scales), group, rows.shape[1])), 15)
    return np.concatenate([_bytes(scales), _bytes(zeros)], axis=1), codes.astype(np.uint8)


def _extremes(rows: F32, group: int) -> tuple[F64, F64]:
    """The least and the most of each group, `[n, groups]`."""
    at = range(0, rows.shape[1], group)
    least, most = np.minimum.reduceat(rows, at, axis=1), np.maximum.reduceat(rows, at, axis=1)
    return least.astype(np.float64), most.astype(np.float64)


def _half(values: F64, *, up: bool) -> npt.NDArray[np.float16]:
    """The nearest float16 that is no smaller (`up`), or no larger. Infinite beyond 65504."""
    nearest = values.astype(np.float16)
    wrong = nearest < values if up else nearest > values
    return np.where(wrong, np.nextafter(nearest, np.float16(np.inf if up else -np.inf)), nearest)


def _divisors(scales: npt.NDArray[np.float16]) -> F32:
    """The scales, 1 in place of 0, where all values are 0."""
    return np.where(scales == 0, np.float16(1), scales).astype(np.float32)


def _bytes(halves: npt.NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(halves.astype("<f2", copy=False)).view(np.uint8)


INT4: Final = (
    *(Grouped(f"int4g{g}", Layout(4, g, _SIGNED, "f16"), partial(_symmetric, group=g)) for g in GROUPS),
    *(Grouped(f"int4g{g}z", Layout(4, g, _UNSIGNED, "f16", zero=True), partial(_asymmetric, group=g)) for g in GROUPS),
)
