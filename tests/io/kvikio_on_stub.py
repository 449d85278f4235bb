"""The real kvikio, in its compatibility mode, with a driver whose device memory is the host's (`stub_driver.c`).

Not collected by itself: `test_kvikio_real.py` runs it in a process with that driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashinfer.config import IoConfig
from flashinfer.io import AlignedBuffer, DeviceReader, Reader, kvikio, open_reader
from tests.io.device_memory import AsHostReader, PretendedMemory, pretended
from tests.io.reader_conformance import FILE_BYTES, ReaderConformance, contents, extents
from tests.io.test_thread_reader import write


def stub() -> ctypes.CDLL:
    """The driver: this process was started with it."""
    return ctypes.CDLL(None)


class TestToTheStub(ReaderConformance):
    @pytest.fixture
    def reader(self, tmp_path: Path) -> Iterator[Reader]:
        self.paths = write(tmp_path, self.blobs)
        reader = open_reader(self.paths, IoConfig(reader="kvikio", threads=4))
        yield AsHostReader(reader, pretended)
        reader.close()

    def truncate(self, reader: Reader, file: int, nbytes: int) -> None:
        os.truncate(self.paths[file], nbytes)

    def break_at(self, reader: Reader, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
        stub().stub_fail_at(ctypes.c_ulong(self.paths[0].stat().st_ino), ctypes.c_long(offset))


def read_all(reader: DeviceReader) -> None:
    """Every byte of the first, twice: most of it in long reads, of which many are in flight, and some in short ones."""
    long = [(at, 32768, at) for at in range(0, FILE_BYTES - 32768, 32768)]
    short = [(at, 4096, at) for at in range(FILE_BYTES - 32768, FILE_BYTES, 4096)]
    with AlignedBuffer(FILE_BYTES) as buffer:
        for _ in range(2):
            buffer.array[:] = 0
            reader.submit_to_device(0, extents(*long, *short), PretendedMemory(buffer.array)).wait()
            assert buffer.array.tobytes() == contents(1)


def test_its_buffers_take_no_more_memory_than_is_planned(tmp_path: Path) -> None:
    config, paths = IoConfig(reader="kvikio", threads=4), write(tmp_path, (contents(1),))
    before = stub().stub_pinned()
    with contextlib.closing(open_reader(paths, config)) as reader:
        assert isinstance(reader, DeviceReader)
        read_all(reader)
    assert 0 < stub().stub_pinned() - before <= config.bounce


def test_the_page_cache_is_left_alone(tmp_path: Path) -> None:
    import kvikio as library

    paths = write(tmp_path, (contents(1),))
    with contextlib.closing(open_reader(paths, IoConfig(reader="kvikio", threads=4))) as reader:
        assert isinstance(reader, DeviceReader)
        if not reader.direct:
            pytest.skip(f"no direct reads here: {reader.note}")
        with paths[0].open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read_all(reader)
        assert library.get_page_cache_info(paths[0]) == (0, FILE_BYTES // 4096)


def test_it_says_how_it_reads(tmp_path: Path) -> None:
    found = kvikio.load_kvikio(write(tmp_path, (contents(1),))[0])
    assert "compatibility mode" in found.how
    assert kvikio._driver() == "12.4"
