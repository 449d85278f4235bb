"""`q4_0`: ggml's Q4_0, four-bit integers with a scale for 32 columns.

Scales and codes are those of gguf (`gguf.quants`, which is ggml's `quantize_row_q4_0_ref`): the scale is the value of
largest magnitude (the first of equals), with its sign, divided by -8, stored as f16; a code is
`trunc(x * (1 / scale) + 8.5)`, at most 15, in float32 with the scale before it was rounded. A value is `code - 8`
times the stored scale, exact in float32. Beyond ggml, the last block may be shorter.

A block of ggml is its scale, then its 16 bytes of codes; a row here is all scales of the row, zeros up to a multiple
of 16 bytes, then all codes, so the same bytes in another order. A value at the other end of the range than the
largest is cut off at 7 scales: the error is at most a scale.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.quant.grouped import Grouped, spread
from flashinfer.quant.layout import Layout

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK: Final = 32
_TABLE: Final = np.arange(-8, 8, dtype=np.float32)


def _quantise(rows: F32) -> tuple[Bytes, Bytes]:
    scales = _outermost(rows) / np.float32(-8)
    halves, factors = scales.astype("<f2"), np.reciprocal(scales)
    factors[~np.isfinite(factors)] = 0  # too small for float16 by far
    values = rows * spread(factors, BLOCK, rows.shape[1])
    values += np.float32(8.5)
    return halves.view(np.uint8), np.minimum(values.astype(np.uint8), 15)


def _outermost(rows: F32) -> F32:
    """The value of largest magnitude of each block `[n, blocks]`, with its sign; the first where two are as large."""
    at = range(0, rows.shape[1], BLOCK)
    least, most = np.minimum.reduceat(rows, at, axis=1), np.maximum.reduceat(rows, at, axis=1)
    found = np.where(most > -least, most, least)
    ties = np.nonzero((most == -least) & (most != 0))
    blocks = rows.reshape(len(rows), -1, BLOCK)[ties]
    found[ties] = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    return found


Q4_0: Final = Grouped("q4_0", Layout(4, BLOCK, _TABLE, "f16"), _quantise)
