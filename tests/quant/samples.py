"""Rows of weights that are the same on every machine: integer arithmetic, and products that are exact in float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def uniform(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Integers of 0 .. 2**24 - 1: splitmix64 of their index (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(1 + (seed << 32))) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.int64)


def weights(rows: int, columns: int, seed: int = 0) -> F32:
    """Roughly normal, of deviation 0.03, each row a little larger than the one before."""
    four = uniform(4 * rows * columns, seed).reshape(rows, columns, 4).sum(axis=2) - (1 << 25)
    scales = (1 + np.arange(rows, dtype=np.float32)[:, None] / 4) * np.float32(2.0**-28)
    return four.astype(np.float32) * scales


def hard_rows(columns: int) -> F32:
    """Three rows for golden bytes, of whole blocks of all codecs: weights as a checkpoint of f16 has them; weights
    with outliers, a run of zeros and equal values; and values of an even grid, many in the middle between two codes."""
    plain, spiky, even = weights(3, columns)
    plain[:] = plain.astype(np.float16)
    spiky[::97] *= 16
    spiky[256:512] = 0
    spiky[512:768] = np.float32(0.03125)
    spiky[768:832] = -spiky[832:896]
    even[:] = (np.arange(columns) * 5 % 381 - 190).astype(np.float32) / 256  # the order of int8's roundings shows at 95
    return np.stack([plain, spiky, even])


OUTLIERS = (0, 3, 97, 1000, 2047)
"""Columns of hard rows that are outliers of `llm.int8`."""
