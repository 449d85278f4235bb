"""What a step reads together: tiles of neurons whose missing records fit into half of the staging buffer. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.config import IoConfig
from flashinfer.io import RecordPlan, cheapest, group_tiles, plan_records
from flashinfer.model.ahead import MISSING
from flashinfer.model.reads import Reading
from flashinfer.store import Geometry

Index = npt.NDArray[np.int64]


@dataclass
class Batch:
    """Tiles first .. last and the reads they wait for, in one half of the staging buffer."""

    first: int
    last: int
    plan: RecordPlan
    half: int
    reading: Reading | None = None


class Batches:
    """Plans reads of one layer. half: bytes of half of the staging buffer. alignment: the reader's."""

    def __init__(self, geometry: Geometry, io: IoConfig, alignment: int, half: int) -> None:
        self._geometry, self._io, self.half = geometry, io, half
        self._knobs = {
            "record_bytes": geometry.record_bytes, "offset": geometry.offset, "alignment": alignment,
            "max_extent": io.max_extent,
        }  # fmt: skip

    def together(self, tiles: int, missing: Index) -> Batch | None:
        """So many tiles at once; None where what they miss does not fit."""
        plan = plan_records(missing, **self._knobs, max_gap=self._io.max_gap)
        return None if plan.extents.total > self.half else Batch(0, tiles, self._cheapest(plan), 0)

    def split(self, tiles: Index, missing: Index, place: Index) -> list[Batch]:
        """All at once, else as many tiles as fit each time. place: of the records (see `NeuronStore`)."""
        whole = self.together(len(tiles), missing)
        if whole is not None:
            return [whole]
        wanted = _wanted(self._geometry, tiles, place)
        found = group_tiles(wanted, budget=self.half, **self._knobs, max_gap=self._io.max_gap)
        return [Batch(a, b, self._cheapest(plan), i % 2) for i, (a, b, plan) in enumerate(found)]

    def _cheapest(self, plan: RecordPlan) -> RecordPlan:
        io = self._io
        if io.objective != "time":
            return plan
        return cheapest(plan, io.disk, **self._knobs, in_flight=io.in_flight, budget=self.half)


def _wanted(g: Geometry, tiles: Index, place: Index) -> list[Index]:
    """The records of each tile whose `place` is MISSING, sorted and distinct."""
    record = g.positions(tiles) // g.bundles_per_record
    tile = np.arange(len(tiles))[:, None]
    pairs = np.unique((tile * g.records + record)[(place[record] == MISSING) & (tiles >= 0)])
    return np.split(pairs % g.records, np.searchsorted(pairs, tile[1:, 0] * g.records))


def offsets_of(g: Geometry, tiles: Index, place: Index) -> Index:
    """Address at which each neuron's bundle starts, 0 (the zeros) for padding; `place` is of the records."""
    position = g.positions(tiles)  # of padding, anybody's
    if g.bundles_per_record == 1:
        start = place[position]
    else:
        record, within = np.divmod(position, g.bundles_per_record)
        start = place[record] + within * g.bundle_bytes
    return np.where(tiles >= 0, start, 0)
