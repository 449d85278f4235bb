"""Weights in torch: the bytes they have in the store, and the one way from them to float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashinfer.quant.int8g32 import BLOCK

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Matrix:
    """Weights `[rows, cols]`: `raw` uint8 `[rows, bytes of a row]` in a codec."""

    raw: Tensor
    codec: str
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.raw.shape[0], self.cols


def row_bytes(codec: str, elements: int) -> int:
    """Bytes of an encoded row."""
    return (BLOCK + 2) * -(-elements // BLOCK) if codec == "int8g32" else elements * DTYPES[codec].itemsize


def unpack(raw: Tensor, codec: str, values: Tensor) -> Tensor:
    """Encoded rows, uint8 `[n, bytes]` with any stride, as float32 `[n, elements]`. Writes and returns `values`."""
    if codec == "int8g32":
        return _unpack_int8g32(raw, values)
    if codec == "f32":  # byte by byte: behind 16-bit values it may start anywhere
        values.view(torch.uint8).copy_(raw)
        return values
    return values.copy_(raw.view(DTYPES[codec]))


def _unpack_int8g32(raw: Tensor, values: Tensor) -> Tensor:
    elements = values.shape[1]
    blocks, whole = -(-elements // BLOCK), elements // BLOCK
    scales = raw[:, : 2 * blocks].view(torch.float16).to(values.device)
    values.copy_(raw[:, 2 * blocks : 2 * blocks + elements].view(torch.int8))
    if whole:
        values[:, : whole * BLOCK].view(-1, whole, BLOCK).mul_(scales[:, :whole, None])
    if whole < blocks:
        values[:, whole * BLOCK :].mul_(scales[:, whole:])
    return values
