"""Double quantisation: scales that are quantised themselves (QLoRA, arXiv 2305.14314, section 3).

The scales of a row, `[groups]` float32, none negative, are stored as

    mean, f32 | for every 256 groups the largest |scale - mean|, f32 | for every group a code of `dynamic`, u8

and read as `table[code] * largest + mean`, in float32, rounded after the product and after the sum: no fused
multiply-add here. `mean` is the mean of the row's scales, taken in float64 and rounded once; bitsandbytes takes it in
float32, over a whole tensor, and may differ in the last bits, and then, where two codes are as near, in a code.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flashinfer.quant.dynamic import TABLE, encode_blocks

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

GROUPS = 256
"""Scales that share one of their own."""


def nested_bytes(groups: int) -> int:
    """Bytes of so many nested scales."""
    return 4 + 4 * -(-groups // GROUPS) + groups


def nested_encode(scales: F32) -> Bytes:
    """Scales `[n, groups]` -> `[n, nested_bytes]`."""
    mean = scales.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    largest, codes = encode_blocks(scales - mean, GROUPS)
    floats = np.concatenate([mean, largest], axis=1).astype("<f4", copy=False)
    return np.concatenate([floats.view(np.uint8), codes], axis=1)


def nested_scales(raw: Bytes) -> F32:
    """`[n, nested_bytes]` -> `[n, groups]`."""
    groups = _groups(raw.shape[1])
    floats = np.ascontiguousarray(raw[:, :-groups]).view("<f4")
    largest = np.repeat(floats[:, 1:], GROUPS, axis=1)[:, :groups]
    values: F32 = TABLE[raw[:, -groups:]] * largest + floats[:, :1]
    return values


def _groups(size: int) -> int:
    """How many scales `size` bytes hold: the inverse of `nested_bytes`."""
    blocks = -(-(size - 4) // (GROUPS + 4))
    return size - 4 - 4 * blocks
