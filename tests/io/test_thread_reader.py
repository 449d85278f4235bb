"""The thread reader, direct and buffered."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from flashinfer.config import IoConfig
from flashinfer.errors import StoreError, StoreReadError
from flashinfer.io import AlignedBuffer, Extents, Reader, ThreadReader, open_reader
from tests.io.reader_conformance import FILE_BYTES, ReaderConformance, assert_reads, contents, extents

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux")
PREADV = os.preadv
Preadv = Callable[[int, list[memoryview], int], int]


def write(folder: Path, blobs: tuple[bytes, ...]) -> list[Path]:
    paths = [folder / f"{i}.bin" for i in range(len(blobs))]
    for path, blob in zip(paths, blobs, strict=True):
        path.write_bytes(blob)
    return paths


def fd_of(reader: Reader, file: int = 0) -> int:
    return cast(ThreadReader, reader)._files[file].fd


class ThreadConformance(ReaderConformance):
    direct = True

    @pytest.fixture
    def reader(self, tmp_path: Path) -> Iterator[Reader]:
        self.paths = write(tmp_path, self.blobs)
        reader = ThreadReader(self.paths, threads=4, direct=self.direct)
        yield reader
        reader.close()

    def truncate(self, reader: Reader, file: int, nbytes: int) -> None:
        os.truncate(self.paths[file], nbytes)

    def break_at(self, reader: Reader, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
        broken = fd_of(reader)

        def preadv(fd: int, views: list[memoryview], at: int) -> int:
            if (fd, at) == (broken, offset):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return PREADV(fd, views, at)

        monkeypatch.setattr(os, "preadv", preadv)

    def test_partial_and_interrupted_reads_are_continued(self, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each read is interrupted once, then brings at most 6000 bytes, not all of them whole units."""
        seen: set[int] = set()

        def preadv(fd: int, views: list[memoryview], at: int) -> int:
            if at not in seen:
                seen.add(at)
                raise InterruptedError
            return PREADV(fd, views, at) if len(views[0]) <= 6000 else min(6000, PREADV(fd, views, at))

        monkeypatch.setattr(os, "preadv", preadv)
        assert_reads(reader, self.blobs[0], extents((8192, 65536, 0)))
        assert all(at % reader.alignment == 0 for at in seen)
        assert len(seen) > 5

    def test_all_extents_end_before_an_error_is_raised(self, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
        """The failing read comes first; a slow one beside it has still ended when `wait` raises."""
        ended, failed = threading.Event(), threading.Event()

        def preadv(fd: int, views: list[memoryview], at: int) -> int:
            if at == 0:
                failed.set()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            failed.wait(10)
            threading.Event().wait(0.05)
            ended.set()
            return PREADV(fd, views, at)

        monkeypatch.setattr(os, "preadv", preadv)
        with AlignedBuffer(8192) as buffer:
            pending = reader.submit(0, extents((4096, 4096, 4096), (0, 4096, 0)), buffer.array)
            with pytest.raises(StoreReadError):
                pending.wait()
        assert ended.is_set()

    def test_an_interrupt_during_wait_leaves_the_reader_usable(
        self, reader: Reader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = threading.Event()

        def preadv(fd: int, views: list[memoryview], at: int) -> int:
            gate.wait(10)
            return PREADV(fd, views, at)

        monkeypatch.setattr(os, "preadv", preadv)
        with AlignedBuffer(4096) as buffer:
            pending = reader.submit(0, extents((0, 4096, 0)), buffer.array)
            timer = threading.Timer(0.05, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
            previous = signal.signal(signal.SIGINT, signal.default_int_handler)
            timer.start()
            try:
                with pytest.raises(KeyboardInterrupt):
                    pending.wait()
            finally:
                timer.join()
                signal.signal(signal.SIGINT, previous)
            gate.set()
            pending.wait()
            assert buffer.array.tobytes() == self.blobs[0][:4096]
        assert_reads(reader, self.blobs[1], extents((4096, 4096, 0)), 1)

    def test_the_buffer_is_free_once_waited_for(self, reader: Reader) -> None:
        """No thread keeps a reference to the last target."""
        target = AlignedBuffer(FILE_BYTES)
        reader.submit(0, extents((0, FILE_BYTES, 0)), target.array).wait()
        memory = target._map
        assert memory is not None
        assert_reads(reader, self.blobs[1], extents((0, 4096, 0)), 1)
        reader.close()
        target.close()
        assert memory.closed


@linux_only
class TestDirect(ThreadConformance):
    def test_direct(self, reader: Reader) -> None:
        assert reader.direct
        assert "O_DIRECT" in reader.note
        assert reader.alignment in (512, 4096)

    def test_alignment_is_found_by_reading(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A device with 4096-byte sectors refuses the 512-byte probe."""
        monkeypatch.setattr(os, "preadv", refuse(lambda length, at: length % 4096 != 0 or at % 4096 != 0))
        reader = ThreadReader(write(tmp_path, self.blobs), threads=1)
        assert (reader.direct, reader.alignment) == (True, 4096)
        reader.close()

    def test_one_file_with_a_larger_unit_sets_the_unit_of_all(self, tmp_path: Path) -> None:
        paths = write(tmp_path, (contents(1), b"short"))
        reader = ThreadReader(paths, threads=1)
        assert (reader.direct, reader.alignment) == (True, 4096)
        reader.close()


class TestBuffered(ThreadConformance):
    direct = False

    def test_buffered(self, reader: Reader) -> None:
        assert not reader.direct
        assert "not asked for" in reader.note


def refuse(what: Callable[[int, int], bool]) -> Preadv:
    """A preadv that fails with EINVAL for some lengths and offsets."""

    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        if what(len(views[0]), at):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return PREADV(fd, views, at)

    return preadv


@linux_only
def test_a_file_that_opens_but_refuses_the_transfer_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = contents(1)
    monkeypatch.setattr(os, "preadv", refuse(lambda length, at: True))
    reader = ThreadReader(write(tmp_path, (blob,)), threads=2)
    monkeypatch.setattr(os, "preadv", PREADV)
    assert not reader.direct
    assert "0.bin refused direct reads: Invalid argument" in reader.note
    assert_reads(reader, blob, extents((0, 8192, 0)))
    reader.close()


@linux_only
def test_a_filesystem_without_direct_reads_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def no_direct(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_direct)
    with_reader = ThreadReader(write(tmp_path, (contents(1), contents(2))), threads=1)
    assert "1.bin" in with_reader.note
    assert with_reader.alignment == 4096
    with_reader.close()


def test_a_missing_file_is_a_store_error_and_closes_the_others(tmp_path: Path) -> None:
    present = write(tmp_path, (contents(1),))
    before = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(StoreError, match=r"cannot open .*absent"):
        ThreadReader([*present, tmp_path / "absent"], threads=1)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    """A store never names one (docs/format.md), so one that appears is not followed."""
    (tmp_path / "link").symlink_to(write(tmp_path, (contents(1),))[0])
    with pytest.raises(StoreError, match=r"cannot open .*link"):
        ThreadReader([tmp_path / "link"], threads=1)


def test_at_least_one_thread(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="thread"):
        ThreadReader(write(tmp_path, (b"x",)), threads=0)


def test_one_slow_read_does_not_hold_up_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first extent ends only after all others did."""
    others, lock, done = 63, threading.Lock(), threading.Event()
    left = [others]

    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        if at == 0:
            assert done.wait(10)
        got = PREADV(fd, views, at)
        with lock:
            left[0] -= at != 0
            if not left[0]:
                done.set()
        return got

    blob = contents(4)
    reader = ThreadReader(write(tmp_path, (blob,)), threads=2)
    monkeypatch.setattr(os, "preadv", preadv)
    offsets = np.arange(64) * 4096
    assert_reads(reader, blob, Extents(offsets, np.full(64, 4096), offsets))
    reader.close()


def test_open_reader_follows_the_config(tmp_path: Path) -> None:
    reader = open_reader(write(tmp_path, (contents(1),)), IoConfig(reader="threads", threads=3))
    assert reader.note.startswith("3 threads")
    reader.close()


def held() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


@linux_only
def test_a_reader_nobody_holds_leaves_nothing_behind(tmp_path: Path) -> None:
    paths = write(tmp_path, (contents(1),))
    before = held()
    reader = ThreadReader(paths, threads=4)
    assert held() == (before[0] + 1, before[1] + 4)
    del reader
    assert held() == before


@linux_only
def test_no_more_threads_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, start, left = write(tmp_path, (contents(1),)), threading.Thread.start, [2]

    def starts(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    before = held()
    monkeypatch.setattr(threading.Thread, "start", starts)
    with pytest.raises(RuntimeError, match="can't start"):
        ThreadReader(paths, threads=4)
    assert held() == before
