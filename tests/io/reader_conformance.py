"""What every reader must do. A reader's test class inherits from `ReaderConformance`."""

from __future__ import annotations

import numpy as np
import pytest

from flashinfer.errors import StoreReadError
from flashinfer.io import AlignedBuffer, Extents, Reader, plan_range

FILE_BYTES = 256 * 1024


def contents(seed: int, nbytes: int = FILE_BYTES) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def extents(*triples: tuple[int, int, int]) -> Extents:
    """From (offset, length, target) triples."""
    columns = np.array(triples, dtype=np.int64).reshape(-1, 3).T
    return Extents(*(np.ascontiguousarray(column) for column in columns))


def assert_reads(reader: Reader, blob: bytes, wanted: Extents, file: int = 0) -> None:
    with AlignedBuffer(max(wanted.total, 4096)) as buffer:
        reader.submit(file, wanted, buffer.array).wait()
        for offset, length, place in zip(wanted.offsets, wanted.lengths, wanted.targets, strict=True):
            assert buffer.array[place : place + length].tobytes() == blob[offset : offset + length]


class ReaderConformance:
    """The suite. `blobs` are the two files every reader of it sees."""

    blobs = (contents(1), contents(2))

    @pytest.fixture
    def reader(self) -> Reader:
        raise NotImplementedError

    def truncate(self, reader: Reader, file: int, nbytes: int) -> None:
        """Cut the file short under the running reader."""
        raise NotImplementedError

    def break_at(self, reader: Reader, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
        """From now on a read of file 0 that starts at this offset fails with EIO."""
        raise NotImplementedError

    def test_says_how_it_reads(self, reader: Reader) -> None:
        assert reader.note
        assert reader.alignment & (reader.alignment - 1) == 0

    def test_every_byte_arrives_at_its_place(self, reader: Reader) -> None:
        wanted = extents((8192, 4096, 12288), (0, 8192, 0), (FILE_BYTES - 4096, 4096, 8192))
        for file, blob in enumerate(self.blobs):
            assert_reads(reader, blob, wanted, file)

    def test_smallest_unit(self, reader: Reader) -> None:
        unit = reader.alignment
        assert_reads(reader, self.blobs[0], extents((3 * unit, unit, unit), (unit, unit, 0)))

    def test_writes_nothing_beside_the_targets(self, reader: Reader) -> None:
        with AlignedBuffer(3 * 4096) as buffer:
            buffer.array[:] = 7
            reader.submit(0, extents((4096, 4096, 4096)), buffer.array).wait()
            assert (buffer.array[:4096] == 7).all()
            assert (buffer.array[8192:] == 7).all()

    def test_hundreds_of_extents_in_one_batch(self, reader: Reader) -> None:
        order = np.random.default_rng(3).permutation(FILE_BYTES // 4096) * 4096
        order = np.concatenate([order] * 8)
        places = np.arange(len(order)) * 4096
        assert_reads(reader, self.blobs[1], Extents(order, np.full(len(order), 4096), places), 1)

    def test_many_batches_in_flight(self, reader: Reader) -> None:
        with AlignedBuffer(64 * 4096) as buffer:
            pending = [reader.submit(i % 2, extents((4096 * i, 4096, 4096 * i)), buffer.array) for i in range(64)]
            for item in reversed(pending):
                item.wait()
            for i in range(64):
                part = slice(4096 * i, 4096 * (i + 1))
                assert buffer.array[part].tobytes() == self.blobs[i % 2][part]

    def test_an_empty_batch_is_done_at_once(self, reader: Reader) -> None:
        with AlignedBuffer(4096) as buffer:
            reader.submit(0, extents(), buffer.array).wait()
        assert (reader.stats.reads, reader.stats.bytes) == (0, 0)

    def test_counts_what_was_submitted(self, reader: Reader) -> None:
        assert_reads(reader, self.blobs[0], extents((0, 4096, 0), (8192, 8192, 4096)))
        assert_reads(reader, self.blobs[0], plan_range(100, 50, alignment=4096, max_extent=8192).extents)
        assert (reader.stats.reads, reader.stats.bytes) == (3, 4 * 4096)
        assert reader.stats.seconds_waiting > 0

    def test_waiting_again_gives_the_same_answer(self, reader: Reader) -> None:
        with AlignedBuffer(8192) as buffer:
            good = reader.submit(0, extents((0, 4096, 0)), buffer.array)
            bad = reader.submit(0, extents((FILE_BYTES, 4096, 4096)), buffer.array)
            for _ in range(2):
                good.wait()
                with pytest.raises(StoreReadError):
                    bad.wait()

    @pytest.mark.parametrize("beyond", [0, 4096])
    def test_reading_past_the_end_is_an_error(self, reader: Reader, beyond: int) -> None:
        start = FILE_BYTES - 4096 + beyond
        with AlignedBuffer(8192) as buffer, pytest.raises(StoreReadError, match="shorter") as caught:
            reader.submit(0, extents((start, 8192, 0)), buffer.array).wait()
        assert (caught.value.offset, caught.value.length) == (start, 8192)

    @pytest.mark.parametrize("size", [100 * 1024, 100 * 1024 + 512, 100 * 1024 + 13, 0])
    def test_a_file_cut_short_is_an_error_never_wrong_bytes(self, reader: Reader, size: int) -> None:
        assert_reads(reader, self.blobs[0], extents((64 * 1024, 64 * 1024, 0)))
        self.truncate(reader, 0, size)
        if size:
            assert_reads(reader, self.blobs[0], extents((64 * 1024, 32 * 1024, 0)))
        with AlignedBuffer(64 * 1024) as buffer, pytest.raises(StoreReadError, match="shorter"):
            reader.submit(0, extents((64 * 1024, 64 * 1024, 0)), buffer.array).wait()
        assert_reads(reader, self.blobs[1], extents((64 * 1024, 64 * 1024, 0)), 1)

    def test_an_io_error_names_its_place_and_the_reader_goes_on(
        self, reader: Reader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.break_at(reader, monkeypatch, 8192)
        with AlignedBuffer(64 * 1024) as buffer:
            wanted = extents(*((4096 * i, 4096, 4096 * i) for i in range(16)))
            with pytest.raises(StoreReadError, match="Input/output error") as caught:
                reader.submit(0, wanted, buffer.array).wait()
        assert (caught.value.offset, caught.value.length) == (8192, 4096)
        assert_reads(reader, self.blobs[0], extents((4096, 4096, 0), (12288, 4096, 4096)))
        assert_reads(reader, self.blobs[1], extents((8192, 4096, 0)), 1)

    @pytest.mark.parametrize(
        "triple",
        [(100, 4096, 0), (4096, 100, 0), (4096, 4096, 100), (-4096, 4096, 0), (0, 0, 0), (0, 4096, 8192)],
    )
    def test_bad_extents_are_refused(self, reader: Reader, triple: tuple[int, int, int]) -> None:
        with AlignedBuffer(8192) as buffer, pytest.raises(ValueError):
            reader.submit(0, extents(triple), buffer.array)
        assert reader.stats.reads == 0

    def test_bad_targets_are_refused(self, reader: Reader) -> None:
        wanted = extents((0, 4096, 0))
        with AlignedBuffer(16384) as buffer:
            frozen = buffer.array[:4096].view()
            frozen.flags.writeable = False
            bad = [buffer.array[1:8193], buffer.array[::2], buffer.array.view(np.uint16), frozen]
            for target in [*bad, buffer.array.reshape(4, 4096)]:
                with pytest.raises(ValueError):
                    reader.submit(0, wanted, target)

    def test_close_finishes_what_is_in_flight_and_may_be_repeated(self, reader: Reader) -> None:
        with AlignedBuffer(FILE_BYTES) as buffer:
            wanted = extents(*((4096 * i, 4096, 4096 * i) for i in range(FILE_BYTES // 4096)))
            pending = reader.submit(0, wanted, buffer.array)
            reader.close()
            assert buffer.array.tobytes() == self.blobs[0]
            reader.close()
            pending.wait()
            with pytest.raises(ValueError, match="closed"):
                reader.submit(0, wanted, buffer.array)
