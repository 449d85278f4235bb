"""One safetensors file: its header strictly parsed, its tensors read by position, never mapped."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.checkpoint.base import TensorInfo, Words
from flashinfer.config import COPY_CHUNK
from flashinfer.errors import CheckpointError

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the format itself."""
_PACKABLE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    info: TensorInfo
    offset: int
    bytes: int


class SafetensorsFile:
    """An open safetensors file. `tensors` says what is in it; reads are `pread`s."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(f"{path} cannot be opened: {e.strerror}; download the checkpoint again") from e
        try:
            self._places = _parse_header(path, self._fd)
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the file by name."""
        return {name: place.info for name, place in self._places.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """Rows `[start, stop)`: `[stop - start, columns]` of unsigned words."""
        offset, word, _, cols = self._layout(name)
        out = np.empty((stop - start, cols), dtype=word)
        self._fill(name, out.reshape(-1), offset + start * cols * out.itemsize)
        return out

    def read_columns(self, name: str, columns: slice | npt.NDArray[np.int64]) -> Words:
        """The given columns, in that order: `[rows, number of columns]` of unsigned words.

        A slice (of step 1) reads just those bytes of each row; an index array reads whole rows, a few at a time.
        """
        offset, word, rows, cols = self._layout(name)
        if isinstance(columns, slice):
            first, last, _ = columns.indices(cols)
            out = np.empty((rows, last - first), dtype=word)
            for r in range(rows):
                self._fill(name, out[r], offset + (r * cols + first) * out.itemsize)
            return out
        out = np.empty((rows, len(columns)), dtype=word)
        step = max(1, COPY_CHUNK // (cols * out.itemsize))
        for r in range(0, rows, step):
            piece = self.read_rows(name, r, min(rows, r + step))
            np.take(piece, columns, axis=1, out=out[r : r + step])
        return out

    def will_need(self, name: str) -> None:
        """Ask the kernel to read the tensor ahead in large pieces, where it takes such hints."""
        place = self._places[name]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, place.offset, place.bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _layout(self, name: str) -> tuple[int, npt.DTypeLike, int, int]:
        """Offset in the file, word type, rows and columns of a tensor that can be packed."""
        place = self._places[name]
        rows, cols = place.info.matrix
        if place.info.dtype not in _PACKABLE.values():
            raise CheckpointError(
                f"tensor {name} of {self.path} is {place.info.dtype}; F32, F16 and BF16 can be packed: "
                "convert the checkpoint to one of them"
            )
        return place.offset, "<u4" if place.info.dtype == "f32" else "<u2", rows, cols

    def _fill(self, name: str, out: Words, offset: int) -> None:
        """Read exactly `out`'s bytes from `offset`."""
        view = out.data.cast("B")
        while view:
            try:
                got = os.preadv(self._fd, [view], offset)
            except OSError as e:
                raise CheckpointError(f"reading tensor {name} of {self.path} failed: {e.strerror}") from e
            if got == 0:
                raise CheckpointError(f"{self.path} ends inside tensor {name}; download the checkpoint again")
            view, offset = view[got:], offset + got


def _parse_header(path: Path, fd: int) -> dict[str, _Place]:
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
    in_order = sorted(places.values(), key=lambda p: (p.offset, p.offset + p.bytes))
    for first, second in pairwise(in_order):
        if first.offset + first.bytes > second.offset:
            raise CheckpointError(
                f"tensors {first.info.name} and {second.info.name} of {path} overlap; download it again"
            )
    return places


def _parse_tensor(path: Path, name: str, entry: Any, base: int, size: int) -> _Place:
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
    return _Place(TensorInfo(name, _PACKABLE.get(dtype, dtype), tuple(shape)), base + start, needed)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**62 for v in value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table
