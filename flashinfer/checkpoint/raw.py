"""Tensors whose values lie in a file as they are: rows and columns read by position, never mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashinfer.checkpoint.base import Columns, TensorInfo, Words
from flashinfer.config import COPY_CHUNK
from flashinfer.errors import CheckpointError

PACKABLE = ("f32", "f16", "bf16")
_WORDS = {"f32": "<u4", "f16": "<u2", "bf16": "<u2", "I32": "<u4", "U8": "u1", "F8_E4M3": "u1"}
"""What can be read; the last three are no values to us, but what others have codes in (`quantised/`)."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in its file; `transposed` where they are the rows of its transpose."""

    info: TensorInfo
    offset: int
    bytes: int
    transposed: bool = False


class RawFile:
    """An open file of tensors. `places` says what is in it; reads are `pread`s.

    Raises:
        CheckpointError: it cannot be opened, or what `parse(path, fd)` raises. Reading methods: a type that cannot
            be packed, a file cut short, an I/O error.
    """

    def __init__(self, path: Path, parse: Callable[[Path, int], Mapping[str, Place]]) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(f"{path} cannot be opened: {e.strerror}; download the checkpoint again") from e
        try:
            self.places = parse(path, self._fd)
        except OSError as e:
            self.close()
            raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the file by name."""
        return {name: place.info for name, place in self.places.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Words:
        """Rows `[start, stop)`: `[stop - start, columns]` of unsigned words."""
        if self.places[name].transposed:
            return _transposed(self._stored_columns(name, slice(start, stop)))
        return self._stored_rows(name, start, stop)

    def read_columns(self, name: str, columns: Columns) -> Words:
        """The given columns, in that order: `[rows, number of columns]` of unsigned words.

        A slice (of step 1) reads just those bytes of each row; an index array reads whole rows, a few at a time.
        """
        if not self.places[name].transposed:
            return self._stored_columns(name, columns)
        if isinstance(columns, slice):
            first, last, _ = columns.indices(self.places[name].info.matrix[1])
            return _transposed(self._stored_rows(name, first, last))
        return _transposed(np.concatenate([self._stored_rows(name, int(c), int(c) + 1) for c in columns]))

    def will_need(self, name: str) -> None:
        """Ask the kernel to read the tensor ahead in large pieces, where it takes such hints."""
        place = self.places[name]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, place.offset, place.bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _stored_rows(self, name: str, start: int, stop: int) -> Words:
        offset, word, _, cols = self._layout(name)
        out = np.empty((stop - start, cols), dtype=word)
        self._fill(name, out.reshape(-1), offset + start * cols * out.itemsize)
        return out

    def _stored_columns(self, name: str, columns: Columns) -> Words:
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
            piece = self._stored_rows(name, r, min(rows, r + step))
            np.take(piece, columns, axis=1, out=out[r : r + step])
        return out

    def _layout(self, name: str) -> tuple[int, npt.DTypeLike, int, int]:
        """Offset in the file, word type, rows and columns (as they are stored) of a tensor that can be packed."""
        place = self.places[name]
        rows, cols = place.info.matrix[::-1] if place.transposed else place.info.matrix
        if place.info.dtype not in _WORDS:
            raise CheckpointError(
                f"tensor {name} of {self.path} is {place.info.dtype}; F32, F16 and BF16 can be packed: "
                "convert the checkpoint to one of them"
            )
        return place.offset, _WORDS[place.info.dtype], rows, cols

    def _fill(self, name: str, out: npt.NDArray[np.unsignedinteger], offset: int) -> None:
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


def _transposed(words: Words) -> Words:
    """A contiguous copy of the transpose."""
    out: Words = np.empty(words.shape[::-1], words.dtype)
    out[:] = words.T
    return out


def check_apart(path: Path, places: Mapping[str, Place]) -> None:
    """Raise CheckpointError where two tensors share a byte."""
    in_order = sorted(places.values(), key=lambda p: (p.offset, p.offset + p.bytes))
    for first, second in pairwise(in_order):
        if first.offset + first.bytes > second.offset:
            raise CheckpointError(
                f"tensors {first.info.name} and {second.info.name} of {path} overlap; download it again"
            )
