"""`int4g32`, `int4g64`, `int4g128`: four-bit integers with a scale for each group of so many columns; those with a `z`
behind the name have a zero-point too, those with `iz` one that is an integer.

Without: codes are 0 .. 15 for the integers -8 .. 7, and a value is its integer times the scale, f16, exact in float32.
The scale is the one of least magnitude, rounded away from zero, that keeps all integers within their range; it is
negative where the largest magnitude is that of a positive value, for which -8 reaches further than 7. The error is at
most half a scale.

With: codes are 0 .. 15, and a value is `code * scale + zero`, rounded once. The zero-point is the least of the group,
the scale a fifteenth of what lies above it, taken in float64; both are f16, the one rounded down and the other up. The
error is at most half a scale, and a rounding.

With an integer zero-point: codes are 0 .. 15, and a value is `(code - z) * scale`, z one of 0 .. 15 and the scale f16,
exact in float32: what checkpoints of GPTQ and AWQ hold. The rule is that of both (arXiv 2210.17323, arXiv 2306.00978;
their quantiser): the range of a group reaches to zero at least, the scale is a fifteenth of it, rounded up to f16, z is
the nearest integer to `-least / scale`, and a code is the quotient plus z, within 0 .. 15. The error is at most a
scale, and zero is exact.

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


def _integer_zero(rows: F32, group: int) -> tuple[Bytes, Bytes]:
    least, most = _extremes(rows, group)
    least, most = np.minimum(least, 0), np.maximum(most, 0)
    scales = _half((most - least) / 15, up=True)
    divisors = _divisors(scales)
    zeros = np.rint(-least.astype(np.float32) / divisors).astype(np.uint8)
    codes = np.rint(rows / spread(divisors, group, rows.shape[1])) + spread(zeros, group, rows.shape[1])
    return np.concatenate([_bytes(scales), zeros], axis=1), np.clip(codes, 0, 15).astype(np.uint8)


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
    *(Grouped(f"int4g{g}z", Layout(4, g, _UNSIGNED, "f16", zero="f16"), partial(_asymmetric, group=g)) for g in GROUPS),
    *(
        Grouped(f"int4g{g}iz", Layout(4, g, _UNSIGNED, "f16", zero="u8"), partial(_integer_zero, group=g))
        for g in GROUPS
    ),
)
