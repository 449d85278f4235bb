"""`dynamic8`: eight-bit dynamic quantisation in blocks of 2048 (arXiv 2110.02861; bitsandbytes' `quantize_blockwise`).

A row is the largest magnitude of each block, f32; zeros up to a multiple of 16 bytes; a byte for each column, which is
an index of the dynamic map (`dynamic`, which says how it is chosen). A value is the map's entry times the largest.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.quant.dynamic import TABLE, encode_blocks
from flashinfer.quant.grouped import Grouped
from flashinfer.quant.layout import Layout

BLOCK: Final = 2048


def _quantise(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    largest, codes = encode_blocks(rows, BLOCK)
    return largest.astype("<f4", copy=False).view(np.uint8), codes


DYNAMIC8: Final = Grouped("dynamic8", Layout(8, BLOCK, TABLE, "f32"), _quantise)
