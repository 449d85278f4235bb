"""The reader that reaches a device, on a stand-in for kvikio: held to what every reader does, in both memories."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashinfer.config import FILE_ALIGNMENT
from flashinfer.errors import StoreReadError
from flashinfer.io import AlignedBuffer, KvikioReader, Reader, kvikio
from tests.io.device_memory import AsHostReader, PretendedMemory, pretended
from tests.io.kvikio_stand_in import StandIn, install, opened
from tests.io.reader_conformance import FILE_BYTES, ReaderConformance, contents, extents
from tests.io.test_thread_reader import PREADV, write


def fail_at(monkeypatch: pytest.MonkeyPatch, broken: int, offset: int) -> None:
    """A read of that descriptor that starts there ends with EIO."""

    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        if (fd, at) == (broken, offset):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return PREADV(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)


class KvikioConformance(ReaderConformance):
    @pytest.fixture
    def reader(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
        install(monkeypatch, StandIn())
        self.paths = write(tmp_path, self.blobs)
        self.opened = opened(self.paths)
        yield self.seen(self.opened)
        self.opened.close()

    def seen(self, reader: KvikioReader) -> Reader:
        raise NotImplementedError

    def truncate(self, reader: Reader, file: int, nbytes: int) -> None:
        os.truncate(self.paths[file], nbytes)


class TestToTheHost(KvikioConformance):
    def seen(self, reader: KvikioReader) -> Reader:
        return reader

    def break_at(self, reader: Reader, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
        host: Any = self.opened._host
        fail_at(monkeypatch, host._files[0].fd, offset)


class TestToADevice(KvikioConformance):
    def seen(self, reader: KvikioReader) -> Reader:
        return AsHostReader(reader, pretended)

    def break_at(self, reader: Reader, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
        fail_at(monkeypatch, self.opened._files[0].fd, offset)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KvikioReader]:
    install(monkeypatch, StandIn())
    reader = opened(write(tmp_path, (contents(1),)))
    yield reader
    reader.close()


def test_memory_of_the_host_is_no_device(reader: KvikioReader) -> None:
    with AlignedBuffer(8192) as buffer, pytest.raises(ValueError, match="must be memory of a device, not ndarray"):
        reader.submit_to_device(0, extents((0, 4096, 0)), buffer.array)


def test_pages_of_a_device_are_larger_than_sectors(reader: KvikioReader) -> None:
    with AlignedBuffer(8192) as buffer, pytest.raises(ValueError, match=f"multiples of {FILE_ALIGNMENT}"):
        reader.submit_to_device(0, extents((512, 512, 0)), PretendedMemory(buffer.array))


def test_both_memories_are_counted_in_one_place(reader: KvikioReader) -> None:
    with AlignedBuffer(8192) as buffer:
        reader.submit(0, extents((0, 4096, 0)), buffer.array).wait()
        reader.submit_to_device(0, extents((4096, 4096, 4096)), PretendedMemory(buffer.array)).wait()
        assert buffer.array.tobytes() == contents(1)[:8192]
    assert (reader.stats.reads, reader.stats.bytes) == (2, 8192)


def test_what_nobody_waited_for_is_kept_until_it_has_ended(reader: KvikioReader) -> None:
    """kvikio has no more than the address: without this the memory could be another's by then."""
    buffer = AlignedBuffer(FILE_BYTES)
    target = PretendedMemory(buffer.array)
    alive = weakref.ref(target)
    pending = reader.submit_to_device(0, extents((0, FILE_BYTES, 0)), target)
    del pending, target
    gc.collect()
    assert alive() is not None
    reader.close()
    assert buffer.array.tobytes() == contents(1)
    gc.collect()
    assert alive() is None
    buffer.close()


def test_the_memory_is_free_once_waited_for(reader: KvikioReader) -> None:
    with AlignedBuffer(FILE_BYTES) as buffer:
        target = PretendedMemory(buffer.array)
        alive = weakref.ref(target)
        pending = reader.submit_to_device(0, extents((0, FILE_BYTES, 0)), target)
        pending.wait()
        del target
        gc.collect()
        assert alive() is None


def test_after_a_result_was_lost_to_ctrl_c_the_read_has_failed(
    reader: KvikioReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kvikio tells it once. So the worst moment to be struck costs a read, never wrong bytes."""
    failure = kvikio._failure

    def struck(*given: Any) -> str | None:
        failure(*given)
        raise KeyboardInterrupt

    with AlignedBuffer(FILE_BYTES) as buffer:
        pending = reader.submit_to_device(0, extents((0, FILE_BYTES, 0)), PretendedMemory(buffer.array))
        monkeypatch.setattr(kvikio, "_failure", struck)
        with pytest.raises(KeyboardInterrupt):
            pending.wait()
        monkeypatch.setattr(kvikio, "_failure", failure)
        for _ in range(2):
            with pytest.raises(StoreReadError, match="No associated state"):
                pending.wait()


def test_a_forgotten_reader_ends_its_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = install(monkeypatch, StandIn())
    paths, before = write(tmp_path, (contents(1),)), len(list(Path("/dev/fd").iterdir()))
    with AlignedBuffer(FILE_BYTES) as buffer:
        reader = opened(paths)
        reader.submit_to_device(0, extents((0, FILE_BYTES, 0)), PretendedMemory(buffer.array))
        del reader
        gc.collect()
        assert np.array_equal(buffer.array, np.frombuffer(contents(1), np.uint8))
    assert stand_in.freed == 1
    assert len(list(Path("/dev/fd").iterdir())) == before
