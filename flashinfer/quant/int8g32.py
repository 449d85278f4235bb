"""Eight-bit integers with one scale for every 32 values of a row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32
"""Values that share a scale."""
LARGEST = 127
_PIECE = 1 << 17
"""Values encoded at once (a row at least): what is needed beside input and output stays in the processor's cache."""


class Int8g32:
    """34 bytes for 32 values; matrices only.

    A row is its scales, float16, little-endian, then its integers; both are whole blocks, the last one filled up with
    zeros. A value is `integer * scale`, exact in float32. The scale is the least float16 that keeps all integers of
    its block within -127 .. 127, so the error is at most half of it. Values up to 127 * 65504 fit; beyond that, and
    for infinities and NaN, OverflowError.
    """

    name = "int8g32"

    def row_bytes(self, elements: int) -> int:
        """Of whole blocks: 34 for every 32 values or part of them."""
        return (BLOCK + 2) * -(-elements // BLOCK)

    def encode(self, rows: F32) -> Bytes:
        """`[n, elements]` -> `[n, row_bytes]`. OverflowError as above."""
        out = np.empty((len(rows), self.row_bytes(rows.shape[1])), dtype=np.uint8)
        step = max(1, _PIECE // max(1, rows.shape[1]))
        for i in range(0, len(rows), step):
            _encode(rows[i : i + step], out[i : i + step])
        return out

    def decode(self, data: Bytes, elements: int | None = None) -> F32:
        """`[n, row_bytes]` -> `[n, elements]`; whole blocks where `elements` is not given."""
        blocks = data.shape[1] // (BLOCK + 2)
        scales = np.ascontiguousarray(data[:, : 2 * blocks]).view("<f2").astype(np.float32)
        integers = data[:, 2 * blocks :].view(np.int8).reshape(len(data), blocks, BLOCK)
        values = np.multiply(integers, scales[:, :, None], dtype=np.float32)
        return np.ascontiguousarray(values.reshape(len(data), blocks * BLOCK)[:, :elements])


def int8g32_rows(scales: npt.NDArray[np.float16], integers: npt.NDArray[np.int8]) -> Bytes:
    """Rows `[n, row_bytes]` of scales `[n, blocks]` and integers `[n, elements]`."""
    padded = np.zeros((len(integers), scales.shape[1] * BLOCK), dtype=np.uint8)
    padded[:, : integers.shape[1]] = integers.view(np.uint8)
    return np.concatenate([np.ascontiguousarray(scales, dtype="<f2").view(np.uint8), padded], axis=1)


def _encode(rows: F32, out: Bytes) -> None:
    """Encode a few rows. Writes `out`."""
    count, elements = rows.shape
    blocks = -(-elements // BLOCK)
    padded = np.zeros((count, blocks * BLOCK), dtype=np.float32)
    padded[:, :elements] = rows
    # several times faster than `.max(axis=2)` over so short an axis
    scales = _scales(np.maximum.reduceat(np.abs(padded), range(0, blocks * BLOCK, BLOCK), axis=1))
    # in float64, where no quotient is rounded onto the middle between two integers
    divisors = np.where(scales > 0, scales, np.float16(1)).astype(np.float64)
    integers = np.rint(padded.reshape(count, blocks, BLOCK) / divisors[:, :, None]).astype(np.int8)
    out[:, : 2 * blocks] = scales.astype("<f2", copy=False).view(np.uint8)
    out[:, 2 * blocks :] = integers.view(np.uint8).reshape(count, blocks * BLOCK)


def _scales(largest: F32) -> npt.NDArray[np.float16]:
    """The least float16 with `127 * scale >= largest`. OverflowError where there is none."""
    with np.errstate(over="ignore"):
        scales = (largest.astype(np.float64) / LARGEST).astype(np.float16)
        low = LARGEST * scales.astype(np.float32) < largest  # exact: 7 bits times 11
        scales = np.where(low, np.nextafter(scales, np.float16(np.inf)), scales)
    if not np.isfinite(scales).all():
        raise OverflowError(f"a value lies beyond {LARGEST} * 65504, the range of int8g32, or is no number; use f32")
    return scales
