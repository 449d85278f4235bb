"""Reads that are known beforehand, as far ahead as a ring of memory holds them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from flashinfer.io import Extents
from flashinfer.model.arena import Bytes
from flashinfer.model.reads import Reading, Reads

Key = tuple[str, int]
"""A matrix and its first row there, or a layer's neurons and the number of the piece."""


@dataclass(frozen=True)
class Piece:
    """Reads into one contiguous place. `reads` says of which file, `useful` how many of the bytes are wanted,
    `logits` whether only the head needs them."""

    key: Key
    reads: Reads
    extents: Extents
    useful: int
    logits: bool = False


@dataclass
class _Place:
    """A piece's part of the ring; what is in it arrives with `reading`."""

    index: int
    start: int
    size: int
    reading: Reading


class Stream:
    """Pieces in order of use, in a cycle: one is used while the ones after it are being read.

    So the disk works on while layers are computed that need nothing of it. Invariants: the places under way and the
    one that is held never overlap; they are in the ring in the order of the cycle, less than one round of it.
    """

    def __init__(self, ring: Bytes, pieces: Sequence[Piece]) -> None:
        self._ring, self._pieces = ring, pieces
        self._index = {piece.key: i for i, piece in enumerate(pieces)}
        self._ahead: deque[_Place] = deque()
        self._held: _Place | None = None
        self._head_follows = True

    def expect_head(self, follows: bool) -> None:
        """Whether the layers to come are followed by the head; else by the layers of another chunk."""
        self._head_follows = follows

    def take(self, key: Key) -> int:
        """The byte of the ring from which on the piece lies, there until the next `take` or `release`.

        Raises:
            StoreReadError: it could not be read.
        """
        self._held = None
        with self._forgetting():
            if not self._ahead or self._pieces[self._ahead[0].index].key != key:
                self._restart(key)
            self._fill()
            place = self._ahead[0]
            self._pieces[place.index].reads.wait(place.reading)
            self._held = self._ahead.popleft()
        return place.start

    def release(self) -> None:
        """The piece that was taken last is not needed any more: its place is read into."""
        held, self._held = self._held, None
        with self._forgetting():
            if held is not None and not self._ahead:  # there was no room beside it
                self._submit(self._after(held.index), 0)
            self._fill()

    def close(self) -> None:
        """Let everything end, and let go of the ring."""
        self.settle()
        self._ring = np.empty(0, dtype=np.uint8)

    def settle(self) -> None:
        """Let everything under way end, and forget it."""
        self._held = None
        self._ahead.clear()
        for reads in {id(piece.reads): piece.reads for piece in self._pieces}.values():
            reads.settle()

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Where this fails or is interrupted, forget what is ahead: the next `take` awaits what is still under way."""
        try:
            yield
        except BaseException:
            self._ahead.clear()
            raise

    def _restart(self, key: Key) -> None:
        """Another piece than the next one is wanted: the first of all, or a step was abandoned."""
        self.settle()
        self._submit(self._index[key], 0)

    def _fill(self) -> None:
        """Read on until the ring is full, or holds one round."""
        while self._ahead and len(self._ahead) < len(self._pieces):
            index = self._after(self._ahead[-1].index)
            if index == self._ahead[0].index:
                return
            start = self._room(self._pieces[index].extents.total)
            if start is None:
                return
            self._submit(index, start)

    def _after(self, index: int) -> int:
        """The piece that is used after that one; itself, where there is no other."""
        count = len(self._pieces)
        for i in range(index + 1, index + count):
            if self._head_follows or not self._pieces[i % count].logits:
                return i % count
        return index

    def _room(self, size: int) -> int | None:
        """Where so many bytes are free, behind what is under way."""
        oldest, newest = self._ahead[0], self._ahead[-1]
        end = newest.start + newest.size
        if newest.start < oldest.start:
            return end if end + size <= oldest.start else None
        if end + size <= len(self._ring):
            return end
        return 0 if size <= oldest.start else None

    def _submit(self, index: int, start: int) -> None:
        piece = self._pieces[index]
        size = piece.extents.total
        reading = piece.reads.submit(piece.extents, self._ring[start : start + size], piece.useful)
        self._ahead.append(_Place(index, start, size, reading))
