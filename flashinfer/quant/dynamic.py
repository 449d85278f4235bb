"""The dynamic map: 256 values in -1 .. 1 of few digits where they are small and more where they are large
(dynamic tree quantisation; Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, 2.1).

Values, codes and scales are those of bitsandbytes (`create_dynamic_map`, `quantize_blockwise` on a CPU), byte for
byte. That first rounds a value, divided by the largest of its block, to the nearest of 65536 even steps over -1 .. 1,
then takes the nearest entry of the map. So zero, in a block that is not all zeros, decodes to 2.1e-5 times the
largest, not to zero, and a code may be the second nearest, by 2 ** -15.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

TINY: Final = np.float32(1e-38)
"""The least divisor. What is smaller than this is divided by it, and not stretched to the whole range."""
_STEPS = 65536


def dynamic_map() -> F32:
    """The 256 values, ascending: decade by decade 1, 2, 4, ... 64 means of neighbours of an even grid from 0.1 to 1."""
    values = [0.0, 1.0]
    for i in range(7):
        decade = np.float32(10.0 ** (i - 6)) * _means(2**i)
        values += [*decade, *-decade]
    return np.sort(np.array(values, dtype=np.float32))


def _means(count: int) -> F32:
    """Means of neighbours of `count + 1` points from 0.1 to 1. Each point is rounded once from the nearer end."""
    low, high = np.float32(0.1), np.float32(1)
    step, n = float((high - low) / np.float32(count)), np.arange(count + 1)
    grid = np.where(n < (count + 1) // 2, float(low) + step * n, float(high) - step * (count - n)).astype(np.float32)
    return (grid[:-1] + grid[1:]) / np.float32(2)


TABLE: Final = dynamic_map()
_NEAREST: Final = np.searchsorted((TABLE[:-1] + TABLE[1:]) / 2, np.linspace(-1, 1, _STEPS)).astype(np.uint8)
"""The code of each of the even steps."""


def encode_blocks(rows: F32, block: int) -> tuple[F32, Bytes]:
    """Rows `[n, columns]` -> the largest magnitude of each block `[n, blocks]`, and codes `[n, columns]`.

    A shorter last block is allowed. The codes of a block of zeros are 0.
    """
    columns = rows.shape[1]
    largest = np.maximum.reduceat(np.abs(rows), range(0, columns, block), axis=1)
    factor = np.repeat(np.reciprocal(np.maximum(largest, TINY)), block, axis=1)[:, :columns]
    steps = np.clip(rows * factor, -1, 1)
    steps += 1
    steps *= np.float32(0.5)
    steps *= np.float32(_STEPS - 1)
    steps += np.float32(0.5)
    codes = _NEAREST.take(steps.astype(np.intp))
    codes *= np.repeat(largest > 0, block, axis=1)[:, :columns]
    return largest, codes
