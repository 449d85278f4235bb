"""Reads part by part: a reader like any other, whose reads begin and end where parts do."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashinfer
from flashinfer.bench.compare.apart import ApartReader, Cuts, cuts_of, split
from flashinfer.io import Extents, Reader, ThreadReader
from flashinfer.pack import pack
from flashinfer.store import open_store
from tests.io.reader_conformance import ReaderConformance, assert_reads, extents

UNIT = 512
LAYER = Cuts(offset=20480, record_bytes=2500, records=40, within=np.array([0, 1000, 2000]))
"""Beyond where the suite counts reads, and not to the end of the file, where it looks for errors."""
PREADV = os.preadv


class TestApart(ReaderConformance):
    @pytest.fixture
    def reader(self, tmp_path: Path) -> Iterator[Reader]:
        self.paths = [tmp_path / f"{i}.bin" for i in range(len(self.blobs))]
        for path, blob in zip(self.paths, self.blobs, strict=True):
            path.write_bytes(blob)
        self.inside = ThreadReader(self.paths, threads=4)
        reader = ApartReader(self.inside, 0, [LAYER])
        yield reader
        reader.close()

    def truncate(self, reader: Reader, file: int, nbytes: int) -> None:
        os.truncate(self.paths[file], nbytes)

    def break_at(self, reader: Reader, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
        broken = self.inside._files[0].fd

        def preadv(fd: int, views: list[memoryview], at: int) -> int:
            if (fd, at) == (broken, offset):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return PREADV(fd, views, at)

        monkeypatch.setattr(os, "preadv", preadv)

    def test_every_part_is_a_read_of_its_own(self, reader: Reader) -> None:
        """40 records of three parts each, and what lies before and behind them in the extent."""
        wanted = extents((16384, 106496, 0))
        assert_reads(reader, self.blobs[0], wanted)
        assert reader.stats.reads == 40 * 3 + 1
        assert_reads(reader, self.blobs[1], wanted, file=1)
        assert reader.stats.reads == 40 * 3 + 2


def plainly(offset: int, length: int, target: int, cuts: Cuts) -> list[tuple[int, int, int]]:
    """The twin: byte by byte."""
    begins = {cuts.offset + r * cuts.record_bytes + w for r in range(cuts.records) for w in cuts.within.tolist()}
    edges = [offset, *(at for at in range(offset + 1, offset + length) if at in begins), offset + length]
    pieces = []
    for low, high in itertools.pairwise(edges):
        low, high = low // UNIT * UNIT, -(-high // UNIT) * UNIT
        pieces.append((low, high - low, target + low - offset))
    return pieces


@st.composite
def layers(draw: st.DrawFn) -> Cuts:
    within = sorted(draw(st.sets(st.integers(0, 1999), min_size=1, max_size=4)))
    return Cuts(draw(st.integers(0, 4096)), draw(st.integers(2000, 2500)), draw(st.integers(1, 5)), np.array(within))


@given(layers(), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=4))
def test_pieces_are_those_of_the_plain_way(cuts: Cuts, spans: list[tuple[int, int]]) -> None:
    triples, target = [], 0
    for start, count in spans:
        triples.append((start * UNIT, count * UNIT, target))
        target += count * UNIT
    got = split(extents(*triples), [cuts], UNIT)
    columns = (got.offsets.tolist(), got.lengths.tolist(), got.targets.tolist())
    assert list(zip(*columns, strict=True)) == [piece for triple in triples for piece in plainly(*triple, cuts)]


def test_the_cuts_of_a_store_are_the_rows_of_its_matrices(tmp_path: Path) -> None:
    pack(Path(flashinfer.__file__).parent / "_demo", tmp_path / "store")
    m = open_store(tmp_path / "store").manifest
    for layer, cuts in zip(m.layers, cuts_of(m), strict=True):
        record = Extents(np.array([cuts.offset]), np.array([layer.record_bytes]), np.array([0]))
        pieces = split(record, [cuts], 1)
        weights = [p for p in layer.parts if p.role.endswith("weight")]
        assert len(pieces.offsets) == len(weights) * layer.bundles_per_record
        assert pieces.total == layer.record_bytes
        assert sorted({int(at - cuts.offset) % layer.bundle_bytes for at in pieces.offsets}) == sorted(
            p.offset for p in weights
        )
