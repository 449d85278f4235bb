"""The in-memory fake is a reader, and shows what real ones hide."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest

from flashinfer.errors import StoreReadError
from flashinfer.io import AlignedBuffer, MemoryReader, Reader
from tests.io.reader_conformance import ReaderConformance, extents


class TestMemoryReader(ReaderConformance):
    @pytest.fixture
    def reader(self) -> Iterator[Reader]:
        reader = MemoryReader(self.blobs)
        yield reader
        reader.close()

    def truncate(self, reader: Reader, file: int, nbytes: int) -> None:
        fake = cast(MemoryReader, reader)
        fake.blobs[file] = fake.blobs[file][:nbytes]

    def break_at(self, reader: Reader, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
        cast(MemoryReader, reader).fail_at.add((0, offset))


def test_the_target_is_poisoned_until_wait() -> None:
    reader = MemoryReader([bytes(4096)])
    with AlignedBuffer(4096) as buffer:
        pending = reader.submit(0, extents((0, 4096, 0)), buffer.array)
        assert buffer.array.all()
        pending.wait()
        assert not buffer.array.any()


def test_a_delay_counts_from_submit() -> None:
    reader = MemoryReader([bytes(4096)], delay=0.02)
    with AlignedBuffer(4096) as buffer:
        started = time.monotonic()
        reader.submit(0, extents((0, 4096, 0)), buffer.array).wait()
        assert time.monotonic() - started >= 0.02


def test_alignment_is_a_knob() -> None:
    reader = MemoryReader([np.arange(64, dtype=np.uint8)], alignment=16)
    with AlignedBuffer(64) as buffer:
        reader.submit(0, extents((16, 32, 32)), buffer.array).wait()
        assert buffer.array[32:].tolist() == list(range(16, 48))
        with pytest.raises(ValueError, match="multiples of 16"):
            reader.submit(0, extents((8, 16, 0)), buffer.array)


def test_fails_when_the_extent_covers_the_bad_byte() -> None:
    reader = MemoryReader([bytes(8192)], fail_at=[(0, 700)])
    with AlignedBuffer(8192) as buffer:
        reader.submit(0, extents((1024, 512, 0)), buffer.array).wait()
        with pytest.raises(StoreReadError, match="Input/output error"):
            reader.submit(0, extents((512, 512, 0)), buffer.array).wait()
