"""`int8`: eight-bit integers with one scale for a row, as the vector-wise quantisation of LLM.int8() has it
(arXiv 2208.07339, 3.1).

A row is the largest magnitude of its values, f32; 12 bytes of zeros; a signed byte for each column. A value is its
integer times the scale, which is that largest times 1/127. Scales and integers are those of bitsandbytes
(`int8_vectorwise_quant`), byte for byte: an integer is `x * (1 / largest * 127)`, each
step in float32, rounded to nearest even.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.quant.grouped import Grouped
from flashinfer.quant.layout import Layout

_TINY: Final = np.float32(1e-36)
"""The least divisor: a 127th of it still has a finite reciprocal."""
_INTEGERS: Final = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)


def _quantise(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    integers = np.rint(rows * (np.reciprocal(np.maximum(largest, _TINY)) * 127)).astype(np.int8)
    return largest.astype("<f4", copy=False).view(np.uint8), integers.view(np.uint8)


INT8: Final = Grouped("int8", Layout(8, None, _INTEGERS, "f32", unit=float(np.float32(1 / 127))), _quantise)
