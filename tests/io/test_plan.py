"""Plans against a plain twin: a file of known bytes, read by the plan's extents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.config import DiskCurve
from flashinfer.io import (
    AlignedBuffer,
    Extents,
    MemoryReader,
    RecordPlan,
    cheapest,
    group_tiles,
    plan_range,
    plan_records,
    worst_case_bytes,
)
from flashinfer.io.plan import numpy_plan

MOST_RECORDS = 60
UNIT = 16
"""Stands for 512 bytes: the plans know no sizes of their own."""


@dataclass(frozen=True)
class Knobs:
    record_bytes: int
    offset: int
    alignment: int
    max_gap: int
    max_extent: int

    def plan(self, records: list[int]) -> RecordPlan:
        return plan_records(np.array(records, dtype=np.int64), **self.__dict__)

    @property
    def file_bytes(self) -> int:
        end = self.offset + MOST_RECORDS * self.record_bytes
        return -(-end // self.alignment) * self.alignment

    def widened(self, record: int) -> tuple[int, int]:
        start, unit = self.offset + record * self.record_bytes, self.alignment
        return start // unit * unit, -(-(start + self.record_bytes) // unit) * unit


@st.composite
def knobs(draw: st.DrawFn) -> Knobs:
    alignment = UNIT * draw(st.sampled_from([1, 2, 4, 8]))
    return Knobs(
        record_bytes=UNIT * draw(st.integers(1, 20)),
        offset=alignment * draw(st.integers(0, 3)),
        alignment=alignment,
        max_gap=draw(st.sampled_from([0, 1, 15, 16, 64, 200, 1000])),
        max_extent=alignment * draw(st.sampled_from([1, 2, 3, 8, 1000])),
    )


record_sets = st.sets(st.integers(0, MOST_RECORDS - 1)).map(sorted)


def covered(knob: Knobs, records: list[int]) -> set[int]:
    """Units a plan must read, the plain way: every widened record, and every hole that is short enough."""
    spans = [knob.widened(record) for record in records]
    holes = [(a[1], b[0]) for a, b in pairwise(spans) if b[0] - a[1] <= knob.max_gap]
    return {unit for low, high in spans + holes for unit in range(low // UNIT, high // UNIT)}


def units_read(extents: Extents) -> list[int]:
    return [
        unit
        for offset, length in zip(extents.offsets.tolist(), extents.lengths.tolist(), strict=True)
        for unit in range(offset // UNIT, (offset + length) // UNIT)
    ]


def read(extents: Extents, file_bytes: int, alignment: int) -> bytes:
    """What the buffer holds; the reader refuses whatever is not aligned or does not fit."""
    reader = MemoryReader([np.random.default_rng(0).bytes(file_bytes)], alignment=alignment)
    with AlignedBuffer(extents.total) as buffer:
        reader.submit(0, extents, buffer.array).wait()
        return buffer.array.tobytes()


@settings(deadline=None)
@given(knobs(), record_sets)
def test_the_native_plan_is_its_numpy_twin(knob: Knobs, records: list[int]) -> None:
    bookkeeping = pytest.importorskip("flashinfer.native._bookkeeping", reason="the native core is not built")
    asked = np.array(records, dtype=np.int64), *knob.__dict__.values()
    for native, twin in zip(bookkeeping.plan(*asked), numpy_plan(*asked), strict=True):
        assert native.dtype == twin.dtype == np.int64
        assert native.tolist() == twin.tolist()


@settings(deadline=None)
@given(knobs(), record_sets)
def test_records_arrive_at_their_places(knob: Knobs, records: list[int]) -> None:
    plan = knob.plan(records)
    blob = np.random.default_rng(0).bytes(knob.file_bytes)
    held = read(plan.extents, knob.file_bytes, knob.alignment)
    assert plan.records.tolist() == records
    for record, place in zip(records, plan.places.tolist(), strict=True):
        start = knob.offset + record * knob.record_bytes
        assert held[place : place + knob.record_bytes] == blob[start : start + knob.record_bytes]


@settings(deadline=None)
@given(knobs(), record_sets)
def test_exactly_the_needed_units_are_read_once(knob: Knobs, records: list[int]) -> None:
    """Nothing is read twice, no wider hole is read through, and with max_gap 0 the bytes are minimal."""
    extents = knob.plan(records).extents
    assert units_read(extents) == sorted(covered(knob, records))
    assert all(0 < length <= knob.max_extent for length in extents.lengths.tolist())
    assert extents.targets.tolist() == (np.cumsum(extents.lengths) - extents.lengths).tolist()


@settings(deadline=None)
@given(knobs(), record_sets)
def test_no_two_extents_could_have_been_one(knob: Knobs, records: list[int]) -> None:
    extents = knob.plan(records).extents
    ends = extents.offsets + extents.lengths
    near = extents.offsets[1:] - ends[:-1] <= knob.max_gap
    assert (extents.lengths[:-1][near] == knob.max_extent).all()


@settings(deadline=None)
@given(knobs(), record_sets)
def test_worst_case_bytes_are_enough(knob: Knobs, records: list[int]) -> None:
    tight = Knobs(**{**knob.__dict__, "max_gap": 0}).plan(records).extents.total
    bound = worst_case_bytes(len(records), knob.record_bytes, knob.alignment)
    assert tight <= bound
    if knob.record_bytes % knob.alignment == 0:
        assert tight == bound


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 1000), st.sampled_from([1, 16, 64]), st.integers(1, 20))
def test_a_range_arrives_whole(start: int, length: int, alignment: int, pieces: int) -> None:
    plan = plan_range(start, length, alignment=alignment, max_extent=alignment * pieces)
    blob = np.random.default_rng(0).bytes(2048)
    assert read(plan.extents, 2048, alignment)[plan.place :][:length] == blob[start : start + length]
    assert plan.extents.total < length + 2 * alignment
    assert all(0 < piece <= alignment * pieces for piece in plan.extents.lengths.tolist())


@settings(deadline=None)
@given(knobs(), st.lists(record_sets, max_size=8), st.integers(0, 100))
def test_tiles_are_grouped_greedily_within_the_budget(knob: Knobs, tiles: list[list[int]], room: int) -> None:
    arrays = [np.array(tile, dtype=np.int64) for tile in tiles]
    largest = max((len(tile) for tile in tiles), default=0)
    budget = worst_case_bytes(largest, knob.record_bytes, knob.alignment) + room * UNIT
    groups = group_tiles(arrays, budget=budget, **knob.__dict__)
    assert [first for first, _, _ in groups] + [len(tiles)] == [0, *(last for _, last, _ in groups)]
    for first, last, plan in groups:
        union = sorted(set().union(*tiles[first:last]))
        assert plan.records.tolist() == union
        assert plan.extents.total <= budget
        fits = len(covered(knob, union)) * UNIT <= budget
        assert fits or last == first + 1
        expected = knob.plan(union) if fits else Knobs(**{**knob.__dict__, "max_gap": 0}).plan(union)
        assert plan.extents.offsets.tolist() == expected.extents.offsets.tolist()
        if fits and last < len(tiles):
            more = sorted(set().union(*tiles[first : last + 1]))
            assert len(covered(knob, more)) * UNIT > budget
        for tile in arrays[first:last]:
            assert plan.records[np.searchsorted(plan.places, plan.places_of(tile))].tolist() == tile.tolist()


def test_a_tile_that_cannot_fit_is_refused() -> None:
    tiles = [np.array([0]), np.array([3, 9])]
    with pytest.raises(ValueError, match=r"tile 1 needs 1024 bytes, the budget is 1023"):
        group_tiles(tiles, budget=1023, record_bytes=512, offset=0, alignment=512, max_gap=0, max_extent=4096)


def test_everything_that_fits_is_one_plan() -> None:
    tiles = list(np.arange(64).reshape(8, 8))
    groups = group_tiles(tiles, budget=1 << 20, record_bytes=512, offset=0, alignment=512, max_gap=0, max_extent=4096)
    assert [(first, last) for first, last, _ in groups] == [(0, 8)]
    assert groups[0][2].extents.lengths.tolist() == [4096] * 8


def test_an_example_by_hand() -> None:
    """Records of 1536 bytes on a device with 4096-byte units: neighbours share a unit, a far one does not."""
    plan = plan_records(
        np.array([0, 1, 4, 20]), record_bytes=1536, offset=4096, alignment=4096, max_gap=0, max_extent=1 << 20
    )
    assert plan.extents.offsets.tolist() == [4096, 32768]
    assert plan.extents.lengths.tolist() == [8192, 4096]
    assert plan.places.tolist() == [0, 1536, 6144, 8192 + 20 * 1536 + 4096 - 32768]


@pytest.mark.parametrize(
    "wrong",
    [{"alignment": 3}, {"alignment": 0}, {"max_extent": 100}, {"max_extent": 0}, {"max_gap": -1}],
)
def test_knobs_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    right = {"record_bytes": 512, "offset": 0, "alignment": 512, "max_gap": 0, "max_extent": 4096}
    with pytest.raises(ValueError):
        plan_records(np.array([1]), **(right | wrong))


def test_a_negative_range_is_refused() -> None:
    with pytest.raises(ValueError, match="no such range"):
        plan_range(-1, 5, alignment=512, max_extent=4096)


def test_union_is_reduced_over_shared_records() -> None:
    tiles = [np.array([5, 7]), np.array([0, 5, 9]), np.array([], dtype=np.int64)]
    [(first, last, plan)] = group_tiles(
        tiles, budget=1 << 20, record_bytes=512, offset=0, alignment=512, max_gap=0, max_extent=4096
    )
    assert (first, last) == (0, 3)
    assert plan.records.tolist() == reduce(np.union1d, tiles).tolist()


curves = st.builds(
    DiskCurve,
    per_read_s=st.sampled_from([0.0, 1e-6, 12e-6, 1e-3]),
    bytes_per_s=st.sampled_from([1e6, 2e9]),
    latency_s=st.sampled_from([0.0, 60e-6, 1e-2]),
)


@settings(deadline=None, max_examples=300)
@given(knobs(), record_sets, curves, st.integers(1, 40), st.integers(0, MOST_RECORDS * 20))
def test_the_cheapest_is_no_dearer_than_either_choice(
    knob: Knobs, records: list[int], disk: DiskCurve, in_flight: int, room: int
) -> None:
    pieces, run = knob.plan(records), Knobs(**{**knob.__dict__, "max_gap": 1 << 40}).plan(records)
    limits = {name: value for name, value in knob.__dict__.items() if name != "max_gap"}
    budget = pieces.extents.total + room * UNIT
    found = cheapest(pieces, disk, in_flight=in_flight, budget=budget, **limits)

    def seconds(plan: RecordPlan) -> float:
        reads = len(plan.extents.offsets)
        return disk.seconds(reads, plan.extents.total, min(in_flight, reads))

    choices = [pieces, *([run] if run.extents.total <= budget else [])]
    assert seconds(found) == min(map(seconds, choices))
    assert found.extents.total <= budget
    assert units_read(found.extents) in [units_read(plan.extents) for plan in choices]
    blob = np.random.default_rng(0).bytes(knob.file_bytes)
    held = read(found.extents, knob.file_bytes, knob.alignment)
    for record, place in zip(records, found.places.tolist(), strict=True):
        start = knob.offset + record * knob.record_bytes
        assert held[place : place + knob.record_bytes] == blob[start : start + knob.record_bytes]


def test_a_whole_layer_is_read_from_end_to_end_where_latency_counts() -> None:
    """Every other of 16 records of 4 KiB: eight reads of which two are in flight, or one of 60 KiB."""
    limits = {"record_bytes": 4096, "offset": 0, "alignment": 4096, "max_extent": 1 << 20}
    pieces = plan_records(np.arange(0, 16, 2), **limits, max_gap=0)
    slow, deep = DiskCurve(1e-6, 2e9, 60e-6), DiskCurve(1e-6, 2e9, 0.0)
    assert cheapest(pieces, slow, in_flight=2, budget=1 << 20, **limits).extents.lengths.tolist() == [15 * 4096]
    assert cheapest(pieces, slow, in_flight=2, budget=14 * 4096, **limits) is pieces
    assert cheapest(pieces, deep, in_flight=2, budget=1 << 20, **limits) is pieces
