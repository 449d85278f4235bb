"""`mxfp4`: four-bit floats e2m1 with a power of two for 32 columns (OCP Microscaling Formats 1.0, 5.1 to 6.3).

A row is a byte for each block, e8m0: the scale is 2 ** (byte - 127); zeros up to a multiple of 16 bytes; the codes.
A value is e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) times the scale, exact.

The scale is 2 ** (floor(log2 of the largest magnitude) - 2). A code is the nearest, of two as near the smaller, and
what lies beyond 6 is cut off; a value that becomes zero loses its sign. That is gguf's rule (`gguf.quants`, ggml).
gguf takes the logarithm in float32, which can be too large by one where a value lies within 2 ** -18 below a power of
two (never in a checkpoint of f16 or bf16); here it is exact, as OCP has it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.quant.grouped import Grouped, largest_of, spread
from flashinfer.quant.layout import Layout, power_scales
from flashinfer.quant.nearest import nearest

BLOCK: Final = 32
_MAGNITUDES: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
_TABLE: Final = np.concatenate([_MAGNITUDES, -_MAGNITUDES])


def _quantise(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    largest = largest_of(rows, BLOCK)
    exponents = np.frexp(largest)[1] - 1  # floor(log2)
    powers = np.where(largest > 0, np.maximum(exponents - 2 + 127, 0), 0).astype(np.uint8)
    scaled = rows / spread(power_scales(powers), BLOCK, rows.shape[1])
    codes = nearest(np.abs(scaled), _MAGNITUDES)
    codes += (scaled < 0).view(np.uint8) * (codes > 0) << 3
    return powers, codes


MXFP4: Final = Grouped("mxfp4", Layout(4, BLOCK, _TABLE, "e8m0"), _quantise)
