"""The header of a GGUF file, strictly parsed: metadata, and where each tensor lies.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` library's own reader maps the file, and follows a
count that lies until memory ends; here every count is held against the bytes that are left.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from flashinfer.errors import CheckpointError

LARGEST_HEADER = 256 << 20
"""Bytes; a vocabulary of a million tokens with its merges stays below a quarter of it."""
_VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip
_LEAST_ENTRY, _LEAST_TENSOR = 13, 24
"""Bytes of the shortest metadata entry and tensor description there can be."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header has it; `shape` with rows first, `offset` from the start of the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """`metadata`: numbers, strings, and arrays: numpy of numbers, lists of strings."""

    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]


def read_header(path: Path, fd: int) -> Header:
    """Parse the header of the open file.

    Raises:
        CheckpointError: it is no GGUF file, of a version or byte order that is not read, cut short or damaged.
        OSError: it cannot be read.
    """
    size = os.fstat(fd).st_size
    with os.fdopen(os.dup(fd), "rb") as stream:
        stream.seek(0)
        cursor = _Cursor(stream, size)
        try:
            return _parse(cursor, size)
        except (ValueError, OverflowError) as e:
            raise CheckpointError(f"{path} cannot be read: {e}, at byte {cursor.at}; download it again") from e


class _Cursor:
    """The header's bytes from front to back; ValueError where it claims more than there are."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self.at, self._end = stream, 0, min(size, LARGEST_HEADER)

    def take(self, count: int) -> bytes:
        self.need(count, "it is cut short or damaged")
        data = self._stream.read(count)
        self.at += len(data)
        if len(data) < count:
            raise ValueError("it is cut short")
        return data

    def need(self, count: int, what: str) -> None:
        if count > self._end - self.at:
            raise ValueError(what)

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return self.take(self.unsigned(8)).decode()


def _parse(cursor: _Cursor, size: int) -> Header:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it is no GGUF file")
    version = cursor.unsigned(4)
    if version & 0xFFFF == 0:
        raise ValueError("it is big-endian, little-endian was expected")
    if version not in _VERSIONS:
        raise ValueError(f"it is GGUF version {version}, {' or '.join(map(str, _VERSIONS))} was expected")
    tensors, entries = cursor.unsigned(8), cursor.unsigned(8)
    cursor.need(entries * _LEAST_ENTRY + tensors * _LEAST_TENSOR, f"it claims {tensors} tensors, {entries} entries")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"key {key[:80]!r} occurs twice")
        metadata[key] = _value(cursor, _value_type(cursor))
    described = [_description(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    return Header(metadata, tuple(_placed(*d, base, size) for d in described))


def _value_type(cursor: _Cursor) -> GGUFValueType:
    return GGUFValueType(cursor.unsigned(4))


def _value(cursor: _Cursor, kind: GGUFValueType) -> Any:
    if kind == GGUFValueType.STRING:
        return cursor.string()
    if kind != GGUFValueType.ARRAY:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()
    inner, count = _value_type(cursor), cursor.unsigned(8)
    if inner == GGUFValueType.ARRAY:
        raise ValueError("it has an array of arrays, which is not read")
    if inner == GGUFValueType.STRING:
        cursor.need(8 * count, f"it claims an array of {count} strings")
        return [cursor.string() for _ in range(count)]
    dtype = np.dtype(_SCALARS[inner])
    return np.frombuffer(cursor.take(count * dtype.itemsize), dtype)


def _description(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape (rows first), type, and offset from the start of the data."""
    name, dimensions = cursor.string(), cursor.unsigned(4)
    if not 1 <= dimensions <= 4:
        raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
    shape = tuple(cursor.unsigned(8) for _ in range(dimensions))
    if 0 in shape:
        raise ValueError(f"tensor {name[:80]!r} is empty")
    return name, shape[::-1], GGMLQuantizationType(cursor.unsigned(4)), cursor.unsigned(8)


def _placed(
    name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int, base: int, size: int
) -> TensorEntry:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"tensor {name[:80]!r} has rows of {shape[-1]} values, {kind.name} needs multiples of {block}")
    length = math.prod(shape) // block * block_bytes
    if base + offset + length > size:
        raise ValueError(f"tensor {name[:80]!r} lies outside the file ({size} bytes): it is cut short")
    return TensorEntry(name, kind, shape, base + offset, length)
