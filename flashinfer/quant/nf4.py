"""`nf4`: four-bit NormalFloat with double quantisation (QLoRA, arXiv 2305.14314, section 3), in blocks of 64; and
`nf4f32`, the same with scales that are not quantised themselves.

A row is its nested scales (`nested`: mean, f32; the largest for 256 blocks, f32; a byte for each block), zeros up to a
multiple of 16 bytes, then its codes. A value is the table's entry times the scale.

Table and codes are those of bitsandbytes (`quantize_4bit`): the nearest entry to `x * (1 / largest)`, in float32, of
two the lower one; the largest magnitude of the block is meant before it is quantised itself. bitsandbytes takes the
second level over a whole tensor, here it is the row's, so that a row depends on itself alone; and it packs two columns
to a byte one after the other, the first in the high half.

A row of `nf4f32` is the largest magnitude of each block, f32; zeros up to a multiple of 16 bytes; its codes, chosen as
above. It holds what a checkpoint of bitsandbytes holds whose second level does not fall on rows.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.quant.dynamic import TINY
from flashinfer.quant.grouped import Grouped, largest_of, spread
from flashinfer.quant.layout import Layout
from flashinfer.quant.nearest import nearest
from flashinfer.quant.nested import nested_encode

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK: Final = 64
TABLE: Final = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
     -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=np.float32,
)  # fmt: skip
"""Quantiles of the normal distribution, scaled to -1 .. 1, with an exact zero (appendix E of the paper)."""


def _nested(rows: F32) -> tuple[Bytes, Bytes]:
    largest, codes = _single(rows)
    return nested_encode(largest.view("<f4")), codes


def _single(rows: F32) -> tuple[Bytes, Bytes]:
    largest = largest_of(rows, BLOCK)
    scaled = rows * spread(np.reciprocal(np.maximum(largest, TINY)), BLOCK, rows.shape[1])
    return largest.astype("<f4", copy=False).view(np.uint8), nearest(scaled, TABLE)


NF4: Final = Grouped("nf4", Layout(4, BLOCK, TABLE, "nested"), _nested)
NF4F32: Final = Grouped("nf4f32", Layout(4, BLOCK, TABLE, "f32"), _single)
