"""FFN neurons: slots, the windowed cache over them, and the reads that fill them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.cache import AlwaysMiss, Change, Policy, WindowCache
from flashinfer.config import COPY_RECORDS, FILE_ALIGNMENT, RunConfig
from flashinfer.errors import StoreReadError
from flashinfer.io import AlignedBuffer, Pending, Reader, RecordPlan, group_tiles, plan_range, plan_records
from flashinfer.ledger import Ledger
from flashinfer.memory import Mode, Plan
from flashinfer.model.weights import Group
from flashinfer.predict import Selection
from flashinfer.store import Geometry, Manifest
from flashinfer.store.geometry import round_up

Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]
NEURON_FILE = 1
"""The neuron file's place among the reader's files."""


@dataclass
class _Layer:
    """One layer's records on disk and its slots, which start at byte `base` of the arena."""

    geometry: Geometry
    policy: Policy
    base: int
    slots: int


@dataclass
class _Batch:
    """Tiles first .. last and the reads they wait for, in one half of the staging buffer."""

    first: int
    last: int
    plan: RecordPlan
    half: int
    pending: Pending | None = None


class NeuronStore:
    """All neurons of a model behind `groups`.

    One arena holds everything a bundle can be in: a bundle of zeros at its start (what padding points to), the slots
    of every layer, and two halves of staging. So a bundle is a byte offset, whether it was a hit or was just read.
    Invariant: arena = zeros + slots + staging = the plan's figures; nothing is allocated per token but indices
    and a few records on their way from staging to slots.
    """

    def __init__(
        self,
        manifest: Manifest,
        geometries: Sequence[Geometry],
        reader: Reader,
        plan: Plan,
        run: RunConfig,
        mode: Mode,
        ledger: Ledger,
    ) -> None:
        self._reader, self._run, self._ledger, self._mode = reader, run, ledger, mode
        self._half = plan.neuron_staging
        base = round_up(max(layer.bundle_bytes for layer in manifest.layers), FILE_ALIGNMENT)
        self._layers: list[_Layer] = []
        for geometry, slots in zip(geometries, plan.slots, strict=True):
            self._layers.append(_Layer(geometry, self._make_policy(geometry.records, slots), base, slots))
            base += round_up(slots * geometry.record_bytes, FILE_ALIGNMENT)
        self._staging = base
        self._buffer = AlignedBuffer(base + 2 * self._half)
        self._arena: Bytes = self._buffer.array
        self._place = np.zeros(max(g.records for g in geometries), dtype=np.int64)
        self._unsettled: list[Pending] = []
        if mode == "cached":
            for layer in self._layers:
                self._preload(layer)

    def _make_policy(self, records: int, slots: int) -> Policy:
        if self._mode != "cached":
            return AlwaysMiss(records)
        cache = self._run.cache
        return WindowCache(records, slots, window=cache.window, retention=cache.retention)

    @property
    def effective_window(self) -> int:
        """How many of the last tokens are wholly resident, in the layer where that is least."""
        return min(layer.policy.effective_window for layer in self._layers)

    def close(self) -> None:
        """Wait for stray reads and drop the arena."""
        self._settle()
        self._arena = np.empty(0, dtype=np.uint8)  # the memory goes with the last who can see it
        self._buffer.close()

    def groups(self, index: int, selection: Selection, tiles: Index) -> Iterator[Group]:
        """See `model.weights.Weights.neurons`. The cache has the selection's records when the last group is out."""
        layer = self._layers[index]
        self._settle()
        try:
            yield from self._step(layer, selection, tiles)
        except BaseException:
            # Wherever it struck, bookkeeping and bytes may disagree now: this layer starts again, empty.
            layer.policy = self._make_policy(layer.geometry.records, layer.slots)
            raise

    # -- one step

    def _step(self, layer: _Layer, selection: Selection, tiles: Index) -> Iterator[Group]:
        """Decide, then read in batches: each is computed while the next one is read into the other half."""
        with self._ledger.managing():
            geometry, account = layer.geometry, self._ledger.current
            needed = geometry.records_of(selection.needed)
            change = layer.policy.step(needed, [geometry.records_of(r) for r in selection.recent])
            self._copy(layer, change.move_to, layer.base + change.move_from * geometry.record_bytes)
            batches = self._batches(layer, change, tiles)
            account.hits += len(needed) - len(change.misses)
            account.misses += len(change.misses)
            account.useful_bytes += len(change.misses) * geometry.record_bytes
        arrived = np.zeros(len(change.insert_records), dtype=bool)
        for i, batch in enumerate(batches):
            for ahead in batches[i : i + 2]:
                self._submit(ahead)
            self._wait(batch)
            with self._ledger.managing():
                self._insert(layer, change, batch, arrived)
                offsets = self._offsets(layer, change, tiles[batch.first : batch.last], batch, arrived)
            yield Group(batch.first, batch.last, self._arena, offsets)

    def _batches(self, layer: _Layer, change: Change, tiles: Index) -> list[_Batch]:
        """Tiles grouped so that what each group misses fits into half of the staging buffer."""
        g, io = layer.geometry, self._run.io
        knobs = {"record_bytes": g.record_bytes, "offset": g.offset, "alignment": self._reader.alignment}
        everything = plan_records(change.misses, **knobs, max_gap=io.max_gap, max_extent=io.max_extent)
        if everything.extents.total <= self._half:
            return [_Batch(0, len(tiles), everything, 0)]
        missing = np.zeros(g.records, dtype=bool)
        missing[change.misses] = True
        per_tile = []
        for tile in tiles:
            records = g.records_of(tile[tile >= 0])
            per_tile.append(records[missing[records]])
        found = group_tiles(per_tile, budget=self._half, **knobs, max_gap=io.max_gap, max_extent=io.max_extent)
        return [_Batch(a, b, plan, i % 2) for i, (a, b, plan) in enumerate(found)]

    def _submit(self, batch: _Batch) -> None:
        extents = batch.plan.extents
        if batch.pending is not None or not extents.total:
            return
        target = self._arena[self._staging + batch.half * self._half :][: extents.total]
        batch.pending = self._reader.submit(NEURON_FILE, extents, target)
        self._unsettled.append(batch.pending)
        account = self._ledger.current
        account.bytes_read += extents.total
        account.reads += len(extents.offsets)

    def _wait(self, batch: _Batch) -> None:
        if batch.pending is not None:
            self._await(batch.pending)
            self._unsettled.remove(batch.pending)

    def _await(self, pending: Pending) -> None:
        before = self._reader.stats.seconds_waiting
        try:
            pending.wait()
        finally:
            self._ledger.current.io_wait += self._reader.stats.seconds_waiting - before

    def _settle(self) -> None:
        """A step that was abandoned may have left reads writing to the staging buffer: let them end first."""
        while self._unsettled:
            with contextlib.suppress(StoreReadError):
                self._await(self._unsettled[-1])
            self._unsettled.pop()

    def _offsets(
        self, layer: _Layer, change: Change, tiles: Index, batch: _Batch, arrived: npt.NDArray[np.bool_]
    ) -> Index:
        """Byte of the arena at which each neuron's bundle starts, 0 (the zeros) for padding."""
        g = layer.geometry
        self._place[batch.plan.records] = self._staging + batch.half * self._half + batch.plan.places
        position = g.positions(np.maximum(tiles, 0))
        record, within = np.divmod(position, g.bundles_per_record)
        slot = layer.policy.slot_of[record]
        in_slot = slot >= 0
        if not arrived.all():
            on_its_way = np.zeros(g.records, dtype=bool)
            on_its_way[change.insert_records[~arrived]] = True
            in_slot &= ~on_its_way[record]
        start = np.where(in_slot, layer.base + slot * g.record_bytes, self._place[record])
        return np.where(tiles >= 0, start + within * g.bundle_bytes, 0)

    # -- slots

    def _insert(self, layer: _Layer, change: Change, batch: _Batch, arrived: npt.NDArray[np.bool_]) -> None:
        """Copy the batch's records that stay from staging to their slots."""
        if arrived.all():
            return
        all_here = len(batch.plan.records) == len(change.misses)
        here = np.flatnonzero(~arrived if all_here else np.isin(change.insert_records, batch.plan.records) & ~arrived)
        at = self._staging + batch.half * self._half + batch.plan.places_of(change.insert_records[here])
        self._copy(layer, change.insert_slots[here], at)
        arrived[here] = True

    def _copy(self, layer: _Layer, slots: Index, sources: Index) -> None:
        """Records at these bytes of the arena to these slots, COPY_RECORDS at a time."""
        size = layer.geometry.record_bytes
        anywhere = np.lib.stride_tricks.as_strided(self._arena, (len(self._arena) - size + 1, size), (1, 1))
        own = self._arena[layer.base : layer.base + layer.policy.slots * size].reshape(-1, size)
        for i in range(0, len(slots), COPY_RECORDS):
            own[slots[i : i + COPY_RECORDS]] = anywhere[sources[i : i + COPY_RECORDS]]

    def _preload(self, layer: _Layer) -> None:
        """Fill the slots with the layer's first records, straight from the device into place."""
        g = layer.geometry
        count = min(layer.policy.slots, g.records)
        if not count:
            return
        layer.policy.preload(np.arange(count))
        align, extent = self._reader.alignment, self._run.io.max_extent
        plan = plan_range(g.offset, count * g.record_bytes, alignment=align, max_extent=extent)
        target = self._arena[layer.base : layer.base + plan.extents.total]
        self._await(self._reader.submit(NEURON_FILE, plan.extents, target))
        account = self._ledger.current
        account.bytes_read += plan.extents.total
        account.reads += len(plan.extents.offsets)
        account.useful_bytes += count * g.record_bytes
