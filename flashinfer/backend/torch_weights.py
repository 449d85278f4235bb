"""Weights in torch: the bytes they have in the store, and the one way from them to float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from flashinfer.backend.base import Bytes, Index
from flashinfer.backend.footprint import UNPACK_PARTS
from flashinfer.backend.torch_codes import unpack_codes
from flashinfer.quant import Codec, Grouped, LlmInt8, codec_named
from flashinfer.quant.int8 import INT8
from flashinfer.quant.int8g32 import BLOCK, LARGEST

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Matrix:
    """Weights `[rows, cols]`: `raw` uint8 `[rows, bytes of a row]` in a codec."""

    raw: Tensor
    codec: str | Codec
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.raw.shape[0], self.cols


def as_tensor(memory: Bytes | Tensor) -> Tensor:
    """Bytes of the host or of the device, as a tensor over them."""
    return memory if isinstance(memory, Tensor) else torch.from_numpy(memory)


def there(numbers: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Numbers of the host or of the device, on that device. The host waits for nothing."""
    return numbers if isinstance(numbers, Tensor) else torch.from_numpy(numbers).to(device, non_blocking=True)


def here(numbers: Index | Tensor) -> Index:
    """Numbers of the host or of the device, on the host."""
    found: Index = numbers.cpu().numpy() if isinstance(numbers, Tensor) else numbers
    return found


def row_bytes(codec: str | Codec, elements: int) -> int:
    """Bytes of an encoded row."""
    return (codec_named(codec) if isinstance(codec, str) else codec).row_bytes(elements)


def unpack(raw: Tensor, codec: str | Codec, values: Tensor) -> Tensor:
    """Encoded rows, uint8 `[n, bytes]` with any stride, as float32 `[n, elements]`, contiguous. Writes and returns
    `values`, with the bits of the codec's `decode`."""
    found = codec_named(codec) if isinstance(codec, str) else codec
    if isinstance(found, Grouped | LlmInt8):
        step = max(1, len(values) // UNPACK_PARTS)
        for i in range(0, len(values), step):
            _unpack_grouped(raw[i : i + step].to(values.device), found, values[i : i + step])
        return values
    if found.name == "int8g32":
        return _unpack_int8g32(raw, values)
    if found.name == "f32":  # byte by byte: behind 16-bit values it may start anywhere
        values.view(torch.uint8).copy_(raw)
        return values
    return values.copy_(raw.view(DTYPES[found.name]))


def _unpack_grouped(raw: Tensor, codec: Grouped | LlmInt8, values: Tensor) -> None:
    if isinstance(codec, Grouped):
        return unpack_codes(raw, codec.layout, values)
    unpack_codes(raw, INT8.layout, values)
    at, count = INT8.row_bytes(values.shape[1]), len(codec.outliers)
    if count:
        halves = raw[:, at : at + 2 * count].clone(memory_format=torch.contiguous_format).view(torch.float16)
        values[:, list(codec.outliers)] = halves.float()
    return None


def pack_int8g32(values: Tensor) -> Tensor:
    """Float32 `[n, elements]` as encoded rows, with the bits of the codec's `encode`, where the values are.

    Raises OverflowError as it does, but on a card, where nobody waits to look: scales there are infinite, and what is
    decoded no number.
    """
    count, elements = values.shape
    blocks = -(-elements // BLOCK)
    padded = F.pad(values, (0, blocks * BLOCK - elements)).view(count, blocks, BLOCK)
    largest = padded.abs().amax(dim=2)
    scales = (largest.double() / LARGEST).half()
    low = scales.float() * LARGEST < largest
    scales = (scales.view(torch.int16) + low).view(torch.float16)  # the next float16, of those that are not negative
    if values.device.type == "cpu" and not scales.isfinite().all():
        raise OverflowError(f"a value lies beyond {LARGEST} * 65504, the range of int8g32, or is no number; use f32")
    divisors = torch.where(scales > 0, scales, 1).double()
    integers = (padded / divisors[:, :, None]).round().to(torch.int8)
    return torch.cat((scales.view(torch.uint8), integers.view(torch.uint8).view(count, -1)), dim=1)


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
