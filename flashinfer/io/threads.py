"""The portable reader: a pool of threads doing positional reads."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from flashinfer.errors import StoreReadError
from flashinfer.io.files import OpenFile, describe, open_files
from flashinfer.io.reader import Extents, ReadStats, check_request

Buffer = npt.NDArray[np.uint8]


class ThreadReader:
    """A `Reader` (see `io.reader`) of persistent daemon threads; the reads themselves run without the GIL.

    A submitted batch is one pile of extents, announced to as many threads as can help; each takes the next
    extent when it is done with the last, so one slow read holds up nobody. Batches are served in order. The
    child of a fork has no such threads, and is refused.

    Args:
        paths: the files, numbered by their place here.
        threads: reads in flight at most.
        direct: try to bypass the page cache; False reads through it and drops the pages afterwards.
        timed: keep how long each read took, for `take_seconds`.

    Raises:
        ValueError: `threads` is below 1.
        StoreError: a file cannot be opened.
        PlatformError: on Windows.
    """

    def __init__(self, paths: Sequence[Path], *, threads: int, direct: bool = True, timed: bool = False) -> None:
        if threads < 1:
            raise ValueError(f"at least one thread is needed, not {threads}")
        self._files = open_files(paths, direct=direct)
        self.alignment = max((file.alignment for file in self._files), default=1)
        self.direct = all(file.refusal is None for file in self._files)
        self.note = f"{threads} threads, {describe(self._files)}"
        self.stats = ReadStats()
        self._queue: SimpleQueue[_Batch | None] = SimpleQueue()
        self._seconds: list[float] | None = [] if timed else None
        self._closed, self._pid = False, os.getpid()
        self._threads: list[threading.Thread] = []
        # whoever forgets to close must not leave threads and open files behind
        weakref.finalize(self, _release, self._queue, self._threads, self._files, self._pid).atexit = False
        try:
            for i in range(threads):
                name = f"flashinfer-read-{i}"
                thread = threading.Thread(target=_work, args=(self._queue,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def submit(self, file: int, extents: Extents, target: Buffer) -> _Batch:
        """As `Reader.submit`."""
        if self._closed:
            raise ValueError("the reader is closed")
        _check_process(self._pid)
        check_request(extents, target, self.alignment)
        self.stats.count(extents)
        batch = _Batch(self._files[file], extents, target, self.stats, self._seconds)
        for _ in range(min(len(self._threads), len(extents.offsets))):
            self._queue.put(batch)
        return batch

    def take_seconds(self) -> list[float]:
        """Of each read that went well since the last call, where the reader is timed: seconds that a thread spent in
        it, in order of the ends."""
        if self._seconds is None:
            return []
        taken = self._seconds[:]
        del self._seconds[: len(taken)]
        return taken

    def close(self) -> None:
        """As `Reader.close`."""
        self._closed = True
        _release(self._queue, self._threads, self._files, self._pid)


class _Batch:
    """Extents of one submit: shared by the threads that read them and the caller that waits."""

    def __init__(
        self, file: OpenFile, extents: Extents, target: Buffer, stats: ReadStats, seconds: list[float] | None
    ) -> None:
        self._file, self._seconds = file, seconds
        self._stats = stats
        self._view = target.data
        self._todo = deque(
            zip(extents.offsets.tolist(), extents.lengths.tolist(), extents.targets.tolist(), strict=True)
        )
        self._left = len(self._todo)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._pid = os.getpid()
        self._error: StoreReadError | None = None
        if not self._left:
            self._done.set()

    def run(self) -> None:
        """Read until nothing is left to take; called by every thread that helps."""
        count = 0
        while True:
            try:
                offset, length, place = self._todo.popleft()
            except IndexError:
                break
            count += 1
            if self._error is None:
                self._read(offset, length, place)
        if count:
            with self._lock:
                self._left -= count
                if not self._left:
                    self._done.set()

    def _read(self, offset: int, length: int, place: int) -> None:
        started = time.perf_counter()
        try:
            self._file.read(offset, self._view[place : place + length])
            if self._seconds is not None:
                self._seconds.append(time.perf_counter() - started)
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error)
            failure = StoreReadError(self._file.path, offset, length, reason)
            failure.__cause__ = error.with_traceback(None)  # its frames would keep the buffer alive
            with self._lock:
                self._error = self._error or failure

    def wait(self) -> None:
        """As `Pending.wait`."""
        _check_process(self._pid)
        started = time.perf_counter()
        try:
            self._done.wait()
        finally:
            self._stats.seconds_waiting += time.perf_counter() - started
        if self._error is not None:
            raise self._error


def _check_process(pid: int) -> None:
    """Raises ValueError where this is not the process of that number: the threads are that one's."""
    if os.getpid() != pid:
        raise ValueError("threads that read do not survive fork(); open the store again in the child")


def _release(
    queue: SimpleQueue[_Batch | None], threads: list[threading.Thread], files: list[OpenFile], pid: int
) -> None:
    """Let the threads finish what is queued, then close the files. Goes on where an interrupted call stopped."""
    if os.getpid() != pid:  # the threads are the parent's, and so is the queue's lock, whatever its state
        threads.clear()
    for _ in threads:
        queue.put(None)
    while threads:
        threads[-1].join()
        threads.pop()
    while files:
        files.pop().close()


def _work(queue: SimpleQueue[_Batch | None]) -> None:
    while (batch := queue.get()) is not None:
        batch.run()
        del batch  # an idle thread must not keep the last buffer alive
