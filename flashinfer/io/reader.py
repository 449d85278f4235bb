"""What a reader is: extents of files into an aligned buffer, many in flight, errors kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from flashinfer.config import FILE_ALIGNMENT, STORE_ALIGNMENT

Index = npt.NDArray[np.int64]
DeviceMemory = Any
"""Bytes of a device: what has the CUDA array interface, and of which a slice is a view, as a tensor of torch."""


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


@runtime_checkable
class DeviceReader(Reader, Protocol):
    """A reader that reads straight to the memory of a device, too, with the same promises. Who has such a one need not
    copy from the host's memory what came through it."""

    def submit_to_device(self, file: int, extents: Extents, target: DeviceMemory) -> Pending:
        """As `submit`, to a device's memory, and counted in the same `stats`. What the device was asked for before,
        and writes to these bytes or uses them, must have ended.

        Before: offsets, lengths and targets are multiples of FILE_ALIGNMENT, which is a page of such devices.

        Raises:
            ValueError: they are not, the target is none, or the reader is closed.
        """
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
    if len(extents.offsets) and int(target.ctypes.data) & (alignment - 1):
        raise ValueError(f"the buffer's address must be a multiple of {alignment}")
    _check_extents(extents, len(target), alignment)


def check_device_request(extents: Extents, target: DeviceMemory) -> None:
    """What must hold before a submit to a device.

    Raises:
        ValueError: the first condition that is broken.
    """
    seen = getattr(target, "__cuda_array_interface__", None)
    if seen is None:
        raise ValueError(f"the target must be memory of a device, not {type(target).__name__}")
    address, read_only = seen["data"]
    if seen["typestr"] != "|u1" or len(seen["shape"]) != 1 or seen.get("strides") not in (None, (1,)) or read_only:
        raise ValueError("the target must be writable contiguous one-dimensional bytes of a device")
    if address % STORE_ALIGNMENT:
        raise ValueError(f"the address on the device must be a multiple of {STORE_ALIGNMENT}")
    _check_extents(extents, seen["shape"][0], FILE_ALIGNMENT)


def _check_extents(extents: Extents, size: int, alignment: int) -> None:
    """They fit a target of so many bytes. Raises ValueError."""
    if not len(extents.offsets) == len(extents.lengths) == len(extents.targets):
        raise ValueError("offsets, lengths and targets must have the same length")
    if not len(extents.offsets):
        return
    bits = extents.offsets | extents.lengths | extents.targets  # negative where one of them is
    every = int(np.bitwise_or.reduce(bits))
    if every & (alignment - 1):
        raise ValueError(f"offsets, lengths and targets must be multiples of {alignment}")
    if every < 0 or int(extents.lengths.min()) == 0:
        raise ValueError("offsets and targets must not be negative, lengths must be positive")
    if int((extents.targets + extents.lengths).max()) > size:
        raise ValueError(f"an extent ends beyond the target's {size} bytes")
