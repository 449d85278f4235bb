"""From missing records to reads: pure, vectorised planning.

Reading a hole and throwing it away beats a second read when the hole is short ("LLM in a flash",
arXiv 2312.11514, section 3.2; "access collapse" in RIPPLE, arXiv 2410.19274). How short, and what reads
take, the caller says: nothing here knows the device.

When almost every record of a layer is missing, as for a long prompt, few holes are too wide to be read through, and
reading straight on takes fewer reads than stopping at them: `cheapest` decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.config import DiskCurve
from flashinfer.io.reader import Extents

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RecordPlan:
    """Reads that bring `records` into a buffer of `extents.total` bytes.

    Attributes:
        records: sorted distinct record numbers.
        places: `places[i]` is the byte of the buffer at which record `records[i]` starts.
        extents: the reads; their targets are contiguous from 0.
    """

    records: Index
    places: Index
    extents: Extents

    def places_of(self, records: Index) -> Index:
        """Places of some of the planned records."""
        found: Index = self.places[np.searchsorted(self.records, records)]
        return found


@dataclass(frozen=True)
class RangePlan:
    """Reads that bring one contiguous byte range into a buffer, where it starts at byte `place`."""

    place: int
    extents: Extents


def _check_knobs(alignment: int, max_extent: int, max_gap: int = 0) -> None:
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment must be a power of two, not {alignment}")
    if max_extent < alignment or max_extent % alignment:
        raise ValueError(f"max_extent must be a positive multiple of the alignment {alignment}, not {max_extent}")
    if max_gap < 0:
        raise ValueError(f"max_gap must not be negative, not {max_gap}")


def _split(starts: Index, lengths: Index, targets: Index, max_extent: int) -> tuple[Index, Index, Index]:
    """Cut runs longer than `max_extent` into pieces of it; only a run's last piece is shorter."""
    if not lengths.size or int(lengths.max()) <= max_extent:
        return starts, lengths, targets
    pieces = -(-lengths // max_extent)
    first = np.cumsum(pieces) - pieces
    run = np.repeat(np.arange(len(pieces)), pieces)
    within = (np.arange(len(run)) - first[run]) * max_extent
    return starts[run] + within, np.minimum(lengths[run] - within, max_extent), targets[run] + within


def plan_records(
    records: Index, *, record_bytes: int, offset: int, alignment: int, max_gap: int, max_extent: int
) -> RecordPlan:
    """Reads for these records of one layer.

    Each record is widened to the alignment; neighbours whose widened ranges lie at most `max_gap` bytes
    apart share one contiguous run; runs are cut at `max_extent` (a record may straddle a cut, for
    the targets of a run are contiguous too).

    Args:
        records: sorted distinct record numbers; may be empty.
        record_bytes: bytes of one record.
        offset: byte of the file at which record 0 starts.
        alignment: unit of the reader, a power of two.
        max_gap: longest hole in bytes that is read through; 0 asks for the fewest bytes.
        max_extent: longest single read in bytes, a multiple of the alignment.

    Raises:
        ValueError: a knob is out of its range.
    """
    _check_knobs(alignment, max_extent, max_gap)
    places, *reads = best_plan(records, record_bytes, offset, alignment, max_gap, max_extent)
    return RecordPlan(records, places, Extents(*reads))


def numpy_plan(
    records: Index, record_bytes: int, offset: int, alignment: int, max_gap: int, max_extent: int
) -> tuple[Index, Index, Index, Index]:
    """The twin of the native plan: places of the records; offsets, lengths and targets of the reads."""
    if not records.size:
        empty = np.empty(0, dtype=np.int64)
        return empty, empty, empty, empty
    starts = records * record_bytes + offset
    low = starts & -alignment
    high = (starts + (record_bytes + alignment - 1)) & -alignment
    opens = np.flatnonzero(low[1:] - high[:-1] > max_gap) + 1
    first = np.concatenate(([0], opens))
    run_starts = low[first]
    lengths = high[np.concatenate((opens - 1, [len(records) - 1]))] - run_starts
    targets = np.cumsum(lengths) - lengths
    shift = np.repeat(targets - run_starts, np.diff(first, append=len(records)))
    return starts + shift, *_split(run_starts, lengths, targets, max_extent)


try:
    from flashinfer.native._bookkeeping import plan as best_plan
except ImportError:  # no compiler at installation
    best_plan = numpy_plan


def cheapest(
    plan: RecordPlan,
    disk: DiskCurve,
    *,
    in_flight: int,
    budget: int,
    record_bytes: int,
    offset: int,
    alignment: int,
    max_extent: int,
) -> RecordPlan:
    """The plan, or one contiguous run from its first record to its last: what is predicted to take less time.

    `max_gap` judges each hole alone, by what a read costs when many are in flight. The whole run counts what that
    leaves out: reads that cuts at `max_extent` make, and the latency that few reads in flight do not hide.

    Args:
        plan: of `plan_records`, with the same knobs.
        disk: what reads take.
        in_flight: reads that are under way at once, at most.
        budget: bytes of the target buffer; a run beyond it is no choice.
        record_bytes: as in `plan_records`, and so are `offset`, `alignment` and `max_extent`.
    """
    pieces = plan.extents
    if len(pieces.offsets) < 2:
        return plan
    span = int(pieces.offsets[-1] + pieces.lengths[-1] - pieces.offsets[0])

    def seconds(reads: int, size: int) -> float:
        return disk.seconds(reads, size, min(in_flight, reads))

    if span > budget or seconds(-(-span // max_extent), span) >= seconds(len(pieces.offsets), pieces.total):
        return plan
    return plan_records(
        plan.records,
        record_bytes=record_bytes,
        offset=offset,
        alignment=alignment,
        max_gap=span,
        max_extent=max_extent,
    )


def plan_range(start: int, length: int, *, alignment: int, max_extent: int) -> RangePlan:
    """Reads for `length` bytes from byte `start` of a file, widened to the alignment, cut at `max_extent`.

    Raises:
        ValueError: a knob is out of its range, or the range is negative.
    """
    _check_knobs(alignment, max_extent)
    if start < 0 or length < 0:
        raise ValueError(f"no such range: {length} bytes from byte {start}")
    low = start & -alignment
    size = ((start + length + alignment - 1) & -alignment) - low if length else 0
    targets = np.arange(0, size, max_extent, dtype=np.int64)
    return RangePlan(start - low, Extents(targets + low, np.minimum(size - targets, max_extent), targets))


def worst_case_bytes(n_records: int, record_bytes: int, alignment: int) -> int:
    """Buffer bytes that are enough for any `n_records` records with `max_gap` 0.

    Holds for layers whose offset is a multiple of the alignment, as in every store.
    """
    phase = alignment - math.gcd(record_bytes, alignment)
    return n_records * -(-(phase + record_bytes) // alignment) * alignment


def _union(parts: Sequence[Index]) -> Index:
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if (joined[1:] > joined[:-1]).all():  # the usual case: consecutive tiles of a layer without a permutation
        return joined
    return np.unique(joined)


def group_tiles(
    tile_records: Sequence[Index],
    *,
    budget: int,
    record_bytes: int,
    offset: int,
    alignment: int,
    max_gap: int,
    max_extent: int,
) -> list[tuple[int, int, RecordPlan]]:
    """Consecutive tiles `[first, last)` with one plan for the union of their records, each within `budget`.

    Greedy: a group takes as many tiles as fit. A longer group never needs fewer bytes, so its end is found by
    galloping and bisection; where everything fits, there is one plan call. A tile that fits only when
    no hole is read through is a group of its own, planned so.

    Args:
        tile_records: per tile its sorted distinct records; tiles may share records and may be empty.
        budget: bytes of the target buffer. `worst_case_bytes` of the largest tile is always enough.
        record_bytes: as in `plan_records`, and so are `offset`, `alignment`, `max_gap`, `max_extent`.

    Raises:
        ValueError: a single tile does not fit, or a knob is out of its range.
    """

    def plan(first: int, last: int, gap: int = max_gap) -> RecordPlan:
        return plan_records(
            _union(tile_records[first:last]),
            record_bytes=record_bytes,
            offset=offset,
            alignment=alignment,
            max_gap=gap,
            max_extent=max_extent,
        )

    groups: list[tuple[int, int, RecordPlan]] = []
    first, step = 0, len(tile_records)
    while first < len(tile_records):
        last, found = _longest_fit(plan, budget, first, len(tile_records), step)
        if found is None:
            last, found = first + 1, plan(first, first + 1, 0)
            if found.extents.total > budget:
                raise ValueError(f"tile {first} needs {found.extents.total} bytes, the budget is {budget}")
        groups.append((first, last, found))
        first, step = last, last - first
    return groups


def _longest_fit(
    plan: Callable[[int, int], RecordPlan], budget: int, first: int, end: int, step: int
) -> tuple[int, RecordPlan | None]:
    """The longest group from `first` that fits, trying `step` tiles first; none when not even one does."""
    best: RecordPlan | None = None
    good, bad, last = first, end + 1, min(first + step, end)
    while bad - good > 1:
        trial = plan(first, last)
        if trial.extents.total <= budget:
            best, good = trial, last
        else:
            bad = last
        grown = good + (good - first)
        last = min(grown, end) if bad > end and grown > good else (good + bad) // 2
    return good, best
