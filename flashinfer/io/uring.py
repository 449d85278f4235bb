"""The io_uring reader: one system call for many reads, and none of the threads' contention for the GIL."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flashinfer.errors import PlatformError, StoreReadError
from flashinfer.io.buffers import AlignedBuffer
from flashinfer.io.files import TRUNCATED, OpenFile, describe, open_files
from flashinfer.io.reader import Extents, ReadStats, check_target

if TYPE_CHECKING:
    from flashinfer.native._ring import Batch, Ring

Buffer = npt.NDArray[np.uint8]


class UringReader:
    """A `Reader` (see `io.reader`) on one io_uring. Linux only, and only where the kernel allows it.

    No thread of its own: `submit` hands the kernel as many reads as may be in flight, and the device works on
    them while the caller computes; those beyond wait until a `submit` or `wait` comes by. May be used from
    several threads, and not in the child of a fork.

    Args:
        paths: the files, numbered by their place here.
        depth: reads in flight at most.
        direct: try to bypass the page cache; False reads through it and drops the pages afterwards.
        timed: keep how long each read took, for `take_seconds`.

    Raises:
        ValueError: `depth` is out of range.
        StoreError: a file cannot be opened.
        PlatformError: there is no io_uring here; the message says why not.
    """

    def __init__(self, paths: Sequence[Path], *, depth: int, direct: bool = True, timed: bool = False) -> None:
        try:
            from flashinfer.native import _ring
        except ImportError as error:
            raise PlatformError("the native core is not built") from error
        files = open_files(paths, direct=direct)
        try:
            self._ring = _ring.Ring([(f.fd, f.alignment, f.refusal is not None) for f in files], depth, timed)
            _try(self._ring, files)
            self._ring.take_seconds()
        except BaseException as error:
            for file in files:
                file.close()
            if isinstance(error, OSError):
                raise PlatformError(f"the kernel refused it: {error.strerror}") from error
            raise
        self._files = files
        self.alignment = max((file.alignment for file in files), default=1)
        self.direct = all(file.refusal is None for file in files)
        self.note = f"io_uring, up to {depth} reads in flight, {describe(files)}"
        self.stats = ReadStats()
        self._closed = False
        # whoever forgets to close must not leave open files behind
        weakref.finalize(self, _release, self._ring, files).atexit = False

    def submit(self, file: int, extents: Extents, target: Buffer) -> UringPending:
        """As `Reader.submit`."""
        if self._closed:
            raise ValueError("the reader is closed")
        check_target(target)
        path = self._files[file].path
        batch = self._ring.submit(file, extents.offsets, extents.lengths, extents.targets, target)
        self.stats.count(extents)
        return UringPending(self._ring, batch, path, extents, self.stats)

    def take_seconds(self) -> list[float]:
        """Of each read that went well since the last call, where the reader is timed: seconds from when it was handed
        to the kernel until its end was seen, by whoever then called `submit` or `wait`. In order of the ends."""
        return self._ring.take_seconds()

    def close(self) -> None:
        """As `Reader.close`."""
        self._closed = True
        _release(self._ring, self._files)


class UringPending:
    """Reads of one submit. The ring, not this, keeps the target alive: nobody has to wait for them."""

    def __init__(self, ring: Ring, batch: Batch, path: str, extents: Extents, stats: ReadStats) -> None:
        self._ring, self._batch = ring, batch
        self._path, self._extents, self._stats = path, extents, stats

    def wait(self) -> None:
        """As `Pending.wait`."""
        started = time.perf_counter()
        try:
            failure = self._ring.wait(self._batch)
        finally:
            self._stats.seconds_waiting += time.perf_counter() - started
        if failure is None:
            return
        which, error = failure
        offset, length = int(self._extents.offsets[which]), int(self._extents.lengths[which])
        raise StoreReadError(self._path, offset, length, os.strerror(error) if error else TRUNCATED)


def why_not(path: Path) -> str | None:
    """Why this file cannot be read with io_uring; None where it can, as found by a trial read.

    Raises:
        StoreError: the file cannot be opened.
    """
    try:
        UringReader([path], depth=1).close()
    except PlatformError as error:
        return str(error)
    return None


def _try(ring: Ring, files: Sequence[OpenFile]) -> None:
    """One small read: a kernel may make a ring and yet not know the request. Raises OSError when it fails."""
    if not files:
        return
    unit = max(file.alignment for file in files)  # the ring's, whichever file is read
    nowhere = np.zeros(1, dtype=np.int64)
    with AlignedBuffer(unit) as buffer:
        failure = ring.wait(ring.submit(0, nowhere, np.array([unit]), nowhere, buffer.array))
    if failure is not None and failure[1]:
        raise OSError(failure[1], os.strerror(failure[1]))


def _release(ring: Ring, files: list[OpenFile]) -> None:
    """Wait for what is in flight, then close the files. Goes on where an interrupted call stopped."""
    ring.close()
    while files:
        files.pop().close()
