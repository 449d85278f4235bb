"""The fake: a reader whose files are bytes in memory, with failures on demand. For tests, anybody's."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from flashinfer.errors import StoreReadError
from flashinfer.io.reader import Extents, ReadStats, check_request

Buffer = npt.NDArray[np.uint8]
_POISON = 0xA5


class MemoryReader:
    """Reads from memory as late as allowed: the target is poisoned at submit and filled at `wait`.

    So a caller that uses a buffer too early sees wrong bytes every time, not now and then.

    Args:
        blobs: the files' contents.
        alignment: unit of offsets, lengths, targets and addresses; a power of two.
        fail_at: `(file, offset)` bytes whose read fails as a bad sector does; may be changed between submits.
        delay: seconds from submit until the bytes are there.
    """

    def __init__(
        self,
        blobs: Sequence[bytes | bytearray | Buffer],
        *,
        alignment: int = 512,
        fail_at: Collection[tuple[int, int]] = (),
        delay: float = 0.0,
    ) -> None:
        self.alignment = alignment
        self.direct = True
        self.note = "from memory"
        self.stats = ReadStats()
        self.blobs = [np.frombuffer(blob, dtype=np.uint8) for blob in blobs]
        self.fail_at = set(fail_at)
        self.delay = delay
        self._pending: list[_MemoryPending] = []
        self._closed = False

    def submit(self, file: int, extents: Extents, target: Buffer) -> _MemoryPending:
        """As `Reader.submit`; an extent that ends beyond its blob is a short read."""
        if self._closed:
            raise ValueError("the reader is closed")
        check_request(extents, target, self.alignment)
        self.stats.count(extents)
        bad = {offset for place, offset in self.fail_at if place == file}
        pending = _MemoryPending(self, file, extents, target, bad)
        self._pending = [p for p in self._pending if not p.done]
        self._pending.append(pending)
        return pending

    def close(self) -> None:
        """As `Reader.close`."""
        self._closed = True
        for pending in self._pending:
            pending.finish()
        self._pending = []


class _MemoryPending:
    def __init__(self, reader: MemoryReader, file: int, extents: Extents, target: Buffer, bad: Collection[int]) -> None:
        self.done = False
        self._stats = reader.stats
        self._blob, self._name = reader.blobs[file], f"memory:{file}"
        self._work: list[tuple[int, int, int]] = list(
            zip(extents.offsets.tolist(), extents.lengths.tolist(), extents.targets.tolist(), strict=True)
        )
        self._target = target
        self._bad = bad
        self._ready = time.monotonic() + reader.delay
        self._error: StoreReadError | None = None
        for _, length, place in self._work:
            target[place : place + length] = _POISON

    def finish(self) -> None:
        """Move the bytes and remember the first failure."""
        if self.done:
            return
        self.done = True
        time.sleep(max(0.0, self._ready - time.monotonic()))
        for offset, length, place in self._work:
            reason = None
            if any(offset <= byte < offset + length for byte in self._bad):
                reason = "Input/output error"
            elif offset + length > len(self._blob):
                reason = "file is shorter than the store says (truncated?)"
            if reason is None:
                self._target[place : place + length] = self._blob[offset : offset + length]
            elif self._error is None:
                self._error = StoreReadError(self._name, offset, length, reason)
        del self._target  # what has ended must not keep the caller's buffer alive

    def wait(self) -> None:
        started = time.perf_counter()
        self.finish()
        self._stats.seconds_waiting += time.perf_counter() - started
        if self._error is not None:
            raise self._error
