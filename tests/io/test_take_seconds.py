"""How long each read took, as the readers tell the disk benchmark."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from flashinfer.config import IoConfig
from flashinfer.errors import StoreReadError
from flashinfer.io import AlignedBuffer, ThreadReader, UringReader, open_host_reader, uring
from flashinfer.io.files import OpenFile
from tests.io.reader_conformance import FILE_BYTES, assert_reads, contents, extents

NAMES: tuple[Literal["io_uring", "threads"], ...] = ("io_uring", "threads")
ALL = extents(*((4096 * i, 4096, 4096 * i) for i in range(FILE_BYTES // 4096)))


def skip_without(name: str) -> None:
    why = uring.why_not(Path(__file__)) if name == "io_uring" else None
    if why is not None:
        pytest.skip(f"no io_uring here: {why}")


@contextlib.contextmanager
def opened(
    path: Path, name: Literal["io_uring", "threads"], *, timed: bool = True
) -> Iterator[ThreadReader | UringReader]:
    skip_without(name)
    with contextlib.closing(open_host_reader([path], IoConfig(reader=name, depth=4, threads=4), timed=timed)) as reader:
        yield reader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(contents(3))
    return tmp_path / "f"


@pytest.mark.parametrize("name", NAMES)
def test_each_read_once_and_no_longer_than_it_all(path: Path, name: Literal["io_uring", "threads"]) -> None:
    with opened(path, name) as reader:
        assert reader.take_seconds() == []
        started = time.perf_counter()
        assert_reads(reader, contents(3), ALL)
        elapsed = time.perf_counter() - started
        seconds = reader.take_seconds()
        assert len(seconds) == 64
        assert 0 < min(seconds) <= max(seconds) <= elapsed
        assert sum(seconds) <= 4 * elapsed  # no more than four were ever in flight
        assert reader.take_seconds() == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_unless_asked_for(path: Path, name: Literal["io_uring", "threads"]) -> None:
    with opened(path, name, timed=False) as reader:
        assert_reads(reader, contents(3), ALL)
        assert reader.take_seconds() == []


@pytest.mark.parametrize("name", NAMES)
def test_reads_that_fail_have_no_time(path: Path, name: Literal["io_uring", "threads"]) -> None:
    with opened(path, name) as reader, AlignedBuffer(8192) as buffer:
        os.truncate(path, 4096)
        with pytest.raises(StoreReadError):
            reader.submit(0, extents((0, 4096, 0), (8192, 4096, 4096)), buffer.array).wait()
        assert len(reader.take_seconds()) <= 1


def test_a_read_in_pieces_counts_once(path: Path) -> None:
    with opened(path, "io_uring") as reader:
        assert isinstance(reader, UringReader)
        reader._ring.fault(0, -1, 4096, 3)
        reader._ring.fault(0, 65536, -errno.EAGAIN, 5)
        assert_reads(reader, contents(3), extents((0, 32768, 0), (65536, 4096, 32768)))
        assert len(reader.take_seconds()) == 2


def test_a_read_that_waits_in_the_kernel_is_as_long_as_that(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a pipe: it ends when somebody writes to it. The oracle is the clock of the one who writes."""
    skip_without("io_uring")
    out, into = os.pipe()
    plain = OpenFile(str(path), os.open(path, os.O_RDONLY), 4096, None)
    monkeypatch.setattr(uring, "open_files", lambda *_, **__: [plain, OpenFile("pipe", out, 4096, None)])
    with contextlib.closing(UringReader([path, path], depth=2, timed=True)) as reader, AlignedBuffer(4096) as buffer:
        submitted = time.perf_counter()
        pending = reader.submit(1, extents((0, 4096, 0)), buffer.array)
        ready = time.perf_counter()
        written = []

        def write() -> None:
            written.append(time.perf_counter())
            os.write(into, b"x" * 4096)

        timer = threading.Timer(0.05, write)
        timer.start()
        pending.wait()
        ended = time.perf_counter()
        timer.join()
        [seconds] = reader.take_seconds()
        assert written[0] - ready <= seconds <= ended - submitted
    os.close(into)
