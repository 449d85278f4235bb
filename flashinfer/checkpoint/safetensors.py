"""One safetensors file: its header strictly parsed, its tensors read by position, never mapped."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from flashinfer.checkpoint.base import TensorInfo
from flashinfer.checkpoint.raw import Place, RawFile, check_apart
from flashinfer.errors import CheckpointError

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the format itself."""
_PACKABLE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


class SafetensorsFile(RawFile):
    """An open safetensors file. Raises CheckpointError: it cannot be opened, or its header is not sound."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _parse_header)


def _parse_header(path: Path, fd: int) -> dict[str, Place]:
    """Places of all tensors, every bound checked. Raises CheckpointError."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(LARGEST_HEADER, size - 8):
        raise CheckpointError(
            f"{path} is no safetensors file or is truncated: {size} bytes, its header claims {length}; "
            "download it again"
        )
    try:
        table = json.loads(os.pread(fd, length, 8), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"the header of {path} is not valid ({e}); download it again") from e
    if not isinstance(table, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object; download it again")
    table.pop("__metadata__", None)
    places = {name: _parse_tensor(path, name, entry, 8 + length, size) for name, entry in table.items()}
    check_apart(path, places)
    return places


def _parse_tensor(path: Path, name: str, entry: Any, base: int, size: int) -> Place:
    def need(condition: bool, what: str) -> None:
        if not condition:
            raise CheckpointError(f"tensor {name[:200]} of {path} {what}; download it again")

    keys = {"dtype", "shape", "data_offsets"}
    need(isinstance(entry, dict) and set(entry) == keys, f"has not exactly the keys {', '.join(sorted(keys))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    need(isinstance(dtype, str) and dtype in _BITS, f"has the unknown dtype {str(dtype)[:40]!r}")
    need(_counts(shape) and len(shape) <= 8, "has a shape that is no list of counts")
    need(_counts(offsets) and len(offsets) == 2, "has bad data_offsets")
    start, end = offsets
    need(start <= end and base + end <= size, f"lies outside the file ({size} bytes): it is truncated")
    needed = math.prod(shape) * _BITS[dtype] // 8
    need(end - start == needed, f"has {end - start} bytes where its shape needs {needed}")
    return Place(TensorInfo(name, _PACKABLE.get(dtype, dtype), tuple(shape)), base + start, needed)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**62 for v in value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table
