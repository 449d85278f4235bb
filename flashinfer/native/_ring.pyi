"""Batches of reads on one io_uring. Linux only; `flashinfer.io.uring` is what to use."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class Batch:
    """Reads of one submit."""

class Ring:
    """An io_uring for a fixed set of files `(descriptor, alignment, forget)`, which stay the caller's.

    With `forget`, what was read is dropped from the page cache; `timed`: see `take_seconds`. Thread safe. Holds each
    target until its batch has ended; deleting the ring waits for that.

    Raises:
        OSError: the kernel has no io_uring, forbids it, or has no room for it.
        ValueError: the depth is out of range.
    """

    registered: bool
    """The kernel holds the files open itself, which saves it a look-up per read."""

    def __init__(self, files: Sequence[tuple[int, int, bool]], depth: int, timed: bool = False) -> None: ...
    def submit(
        self,
        file: int,
        offsets: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
        target: npt.NDArray[np.uint8],
    ) -> Batch:
        """Start reading. Raises ValueError when closed, after fork(), or when an extent or the target breaks what must
        hold before (`io.reader.Reader`), by the largest alignment of the files."""

    def wait(self, batch: Batch) -> tuple[int, int] | None:
        """Block until the batch has ended. The place in it of the read that failed first, and its errno (0: the
        file ended too early); None when all went well. A signal's exception leaves the batch under way."""

    def close(self) -> None:
        """Wait for what is in flight and give the ring back. Idempotent."""

    def take_seconds(self) -> list[float]:
        """Of each read that went well since the last call, in a ring that is timed: seconds from when it was handed to
        the kernel until its end was seen, in order of the ends."""

    def fault(self, file: int, offset: int, result: int, times: int = 1) -> None:
        """For tests: the next `times` reads (-1: all) of the file that start at `offset` (-1: anywhere) end with
        `result`: a negative errno, or at most so many bytes."""
