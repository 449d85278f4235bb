"""What a reader is: extents of files into an aligned buffer, many in flight, errors kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Extents:
    """Reads of one file: `lengths[i]` bytes at `offsets[i]` go to `targets[i]` of a buffer.

    All three are multiples of the reader's alignment. Made by `io.plan`.
    """

    offsets: Index
    lengths: Index
    targets: Index

    @cached_property
    def total(self) -> int:
        """Bytes read, which is also the size the buffer needs."""
        return int(self.lengths.sum())


@dataclass
class ReadStats:
    """Counted by every reader: what was asked of the device, when it was submitted.

    `seconds_waiting` is the time callers spent in `Pending.wait`.
    """

    bytes: int = 0
    reads: int = 0
    seconds_waiting: float = 0.0

    def count(self, extents: Extents) -> None:
        """Add one submitted batch."""
        self.bytes += extents.total
        self.reads += len(extents.offsets)


class Pending(Protocol):
    """Reads under way."""

    def wait(self) -> None:
        """Block until all of them ended. Raises StoreReadError for the first that failed: an OS error or
        a short read; all of them have ended then, too. The buffer's bytes must not be used after an error,
        the buffer itself may be. May be called again: same answer."""
        ...


class Reader(Protocol):
    """Positional reads of a fixed set of files.

    Mutates: the target buffer, between `submit` and the end of `Pending.wait`, and `stats`.
    Before: offsets, lengths and targets are multiples of `alignment`; the buffer is a writable, contiguous
    uint8 array whose address is a multiple of it. After `close`, nothing is in flight.
    """

    alignment: int
    direct: bool
    note: str
    """One line for people: how it reads, and why it fell back if it did."""
    stats: ReadStats

    def submit(self, file: int, extents: Extents, target: npt.NDArray[np.uint8]) -> Pending:
        """Start reading from the file at that place in `paths`. EINTR is retried; nothing is read twice.

        Raises:
            ValueError: the arguments break what must hold before, or the reader is closed.
        """
        ...

    def close(self) -> None:
        """Wait for what is in flight, release threads and files. Idempotent."""
        ...


class ReaderFactory(Protocol):
    """How a caller opens files with the reader of its choice."""

    def __call__(self, paths: Sequence[Path]) -> Reader:
        """Open the files; the reader numbers them by their place here."""
        ...


def check_target(target: npt.NDArray[np.uint8]) -> None:
    """What reads may go to. Raises ValueError for anything else."""
    if target.dtype != np.uint8 or target.ndim != 1 or not target.flags.c_contiguous or not target.flags.writeable:
        raise ValueError("the target must be a writable contiguous one-dimensional uint8 array")


def check_request(extents: Extents, target: npt.NDArray[np.uint8], alignment: int) -> None:
    """What must hold before a submit, for every reader (the ring of io_uring looks at the extents itself).

    Raises:
        ValueError: the first condition that is broken.
    """
    check_target(target)
    if not len(extents.offsets) == len(extents.lengths) == len(extents.targets):
        raise ValueError("offsets, lengths and targets must have the same length")
    if not len(extents.offsets):
        return
    bits = extents.offsets | extents.lengths | extents.targets  # negative where one of them is
    every = int(np.bitwise_or.reduce(bits))
    if (every | int(target.ctypes.data)) & (alignment - 1):
        raise ValueError(f"offsets, lengths, targets and the buffer's address must be multiples of {alignment}")
    if every < 0 or int(extents.lengths.min()) == 0:
        raise ValueError("offsets and targets must not be negative, lengths must be positive")
    if int((extents.targets + extents.lengths).max()) > len(target):
        raise ValueError(f"an extent ends beyond the target's {len(target)} bytes")
