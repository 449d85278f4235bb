"""`fp8`: eight-bit floats e4m3 with one scale for a row (OCP 8-bit Floating Point Specification 1.0; Micikevicius et
al., "FP8 Formats for Deep Learning", arXiv 2209.05433).

e4m3: sign, four bits of exponent (bias 7), three of mantissa; no infinities, the largest value is 448, 0x7f and 0xff
are NaN and not written. A row is its scale, f32, the largest magnitude divided by 448; 12 bytes of zeros; a byte for
each column. A value is its float times the scale. A code is `x / scale` in float32, cut off at 448, rounded to nearest
even: what torch's `(x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)` gives.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from flashinfer.quant.grouped import Grouped
from flashinfer.quant.layout import Layout

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

LARGEST: Final = np.float32(448)
_SMALLEST_NORMAL: Final = np.float32(2**-6)
_SHIFTER: Final = np.float32(2**14)
"""Added to a number below 2**-6, it leaves the multiple of 2**-9 in the last bits."""


def e4m3_encode(values: F32) -> Bytes:
    """Values within -448 .. 448 -> e4m3, to nearest even."""
    magnitudes = np.abs(values)
    bits = magnitudes.view(np.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # the exponent's bias falls from 127 to 7
    small = (magnitudes + _SHIFTER).view(np.uint32) & 0xFF
    signs = np.signbit(values).astype(np.uint8) << np.uint8(7)
    sizes = np.where(magnitudes < _SMALLEST_NORMAL, small, normal).astype(np.uint8)
    return sizes | signs


def e4m3_values() -> F32:
    """The value of each of the 256 codes; NaN of 0x7f and 0xff."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    values[-1] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


def _quantise(rows: F32) -> tuple[Bytes, Bytes]:
    scales = np.abs(rows).max(axis=1, keepdims=True, initial=0) / LARGEST
    divided = rows / np.maximum(scales, np.finfo(np.float32).tiny)
    codes = e4m3_encode(np.clip(divided, -LARGEST, LARGEST))
    return scales.astype("<f4", copy=False).view(np.uint8), codes


FP8: Final = Grouped("fp8", Layout(8, None, e4m3_values(), "f32"), _quantise)
