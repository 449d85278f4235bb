"""The unquantised codecs: little-endian IEEE float32, float16 and bfloat16."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def f32_to_bf16(values: F32) -> npt.NDArray[np.uint16]:
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x0040
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> F32:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Float32:
    """4 bytes a value, exact."""

    name = "f32"

    def row_bytes(self, elements: int) -> int:
        return 4 * elements

    def encode(self, rows: F32) -> Bytes:
        return np.ascontiguousarray(rows, dtype="<f4").view(np.uint8)

    def decode(self, data: Bytes, elements: int | None = None) -> F32:
        return np.ascontiguousarray(data).view("<f4").astype(np.float32, copy=False)[..., :elements]


class Float16:
    """2 bytes a value; a finite value beyond 65504 raises OverflowError rather than become infinite."""

    name = "f16"

    def row_bytes(self, elements: int) -> int:
        return 2 * elements

    def encode(self, rows: F32) -> Bytes:
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(rows).astype("<f2")
        if np.isinf(half).any() and not np.isinf(rows[np.isinf(half)]).all():
            raise OverflowError("a value lies beyond 65504, the range of f16; use bf16 or f32")
        return half.view(np.uint8)

    def decode(self, data: Bytes, elements: int | None = None) -> F32:
        return np.ascontiguousarray(data).view("<f2").astype(np.float32)[..., :elements]


class BFloat16:
    """2 bytes a value, the upper half of a float32, rounded to nearest even; a finite value that would round
    to infinity raises OverflowError."""

    name = "bf16"

    def row_bytes(self, elements: int) -> int:
        return 2 * elements

    def encode(self, rows: F32) -> Bytes:
        bits = f32_to_bf16(rows).astype("<u2")
        infinite = (bits & 0x7FFF) == 0x7F80
        if infinite.any() and np.isfinite(rows[infinite]).any():
            raise OverflowError("a value lies beyond 3.39e38, the range of bf16; use f32")
        return bits.view(np.uint8)

    def decode(self, data: Bytes, elements: int | None = None) -> F32:
        return bf16_to_f32(np.ascontiguousarray(data).view("<u2"))[..., :elements]
