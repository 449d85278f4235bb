"""FFN neurons: slots, the windowed cache over them, and the reads that fill them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.cache import AlwaysMiss, Change, Policy, tiered_cache, window_cache
from flashinfer.config import RunConfig
from flashinfer.io import Reader, RecordPlan, cheapest, group_tiles, plan_records
from flashinfer.ledger import Ledger
from flashinfer.memory import Mode, Plan
from flashinfer.model.ahead import MISSING, Guesses
from flashinfer.model.arena import Arena
from flashinfer.model.reads import Reading, Reads
from flashinfer.model.slots import Slots
from flashinfer.model.stream import Piece, Stream
from flashinfer.model.weights import Ahead, Group, Need, decode_tiles, no_guess
from flashinfer.store import Geometry

Index = npt.NDArray[np.int64]
NEURON_FILE = 1
"""The neuron file's place among the reader's files."""


@dataclass
class _Layer:
    """One layer's records on disk, and which of them are in its slots."""

    geometry: Geometry
    policy: Policy


@dataclass
class _Batch:
    """Tiles first .. last and the reads they wait for, in one half of the staging buffer."""

    first: int
    last: int
    plan: RecordPlan
    half: int
    reading: Reading | None = None


class NeuronStore:
    """All neurons of a model behind `groups`.

    Nothing is allocated per token but indices and a few records on their way from staging to slots.
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        reader: Reader,
        plan: Plan,
        run: RunConfig,
        mode: Mode,
        ledger: Ledger,
        arena: Arena,
        slots: Slots,
    ) -> None:
        self._run, self._ledger, self._mode, self._slots = run, ledger, mode, slots
        self._reads, self._alignment = Reads(reader, NEURON_FILE, "neurons", ledger), reader.alignment
        self._half, self._staging, self._arena = plan.neuron_staging, arena.staging, arena.bytes
        self._layers = [_Layer(geometry, self._make_policy(i, geometry)) for i, geometry in enumerate(geometries)]
        self._guesses = Guesses(
            geometries, reader, NEURON_FILE, run.io, arena.bytes, arena.guesses, plan.guess, ledger
        ) if plan.guess else None  # fmt: skip
        self._places = np.zeros(max(g.records for g in geometries), dtype=np.int64)
        if mode == "cached":
            for i, layer in enumerate(self._layers):
                layer.policy.preload(slots.load(i, self._reads, self._alignment, run.io.max_extent))

    def _make_policy(self, index: int, geometry: Geometry) -> Policy:
        if self._mode != "cached":
            return AlwaysMiss(geometry.records)
        near, slots = self._slots.near[index], self._slots.total[index]
        window, retention = self._run.cache.window, self._run.cache.retention
        if near:
            return tiered_cache(geometry.records, near, slots - near, window=window, retention=retention)
        return window_cache(geometry.records, slots, window=window, retention=retention)

    @property
    def effective_window(self) -> int:
        """How many of the last tokens are wholly resident, in the layer where that is least."""
        return min(layer.policy.effective_window for layer in self._layers)

    def close(self) -> None:
        """Wait for stray reads and let go of the arena."""
        self._settle()
        self._arena = np.empty(0, dtype=np.uint8)

    def pieces(self, layer: int) -> list[Piece]:
        """Nothing is known beforehand."""
        return []

    def read_from(self, stream: Stream) -> None:
        """Nothing is taken from the stream."""

    def groups(self, index: int, need: Need, guess: Ahead = no_guess) -> Iterator[Group]:
        """See `model.weights.Weights.neurons`. The cache has the need's records when the last group is out."""
        g = self._layers[index].geometry
        with self._ledger.planning():
            recent = [g.records_of(neurons) for neurons in need.selection.recent]
            needed = g.records_of(need.selection.needed)
        yield from self._whole_step(index, needed, recent, need.tiles, guess)

    def _settle(self) -> None:
        self._reads.settle()
        if self._guesses is not None:
            self._guesses.settle()

    def _whole_step(
        self, index: int, needed: Index, recent: list[Index], tiles: Index, guess: Ahead = no_guess
    ) -> Iterator[Group]:
        """A step that is made to its end, or else leaves the layer as it was at the beginning."""
        self._reads.settle()
        layer = self._layers[index]
        try:
            yield from self._step(index, needed, recent, tiles, guess)
        except BaseException:
            # Wherever it struck, bookkeeping and bytes may disagree now: this layer starts again, empty.
            layer.policy = self._make_policy(index, layer.geometry)
            raise

    def window(self) -> list[list[Index]]:
        """The records each layer's last tokens used, oldest first."""
        return [layer.policy.window for layer in self._layers]

    def warm(self, window: Sequence[Sequence[Index]]) -> None:
        """Bring back what `window` gave, as if those tokens had just been seen."""
        for index, sets in enumerate(window[: len(self._layers)]):
            g = self._layers[index].geometry
            recent = [np.unique(records[(records >= 0) & (records < g.records)]) for records in sets]
            wanted = np.zeros(g.records, dtype=bool)
            for records in recent:
                wanted[records] = True
            if wanted.any():
                neurons = np.flatnonzero(wanted[g.positions(np.arange(g.neurons)) // g.bundles_per_record])
                for _ in self._whole_step(index, np.flatnonzero(wanted), recent, decode_tiles(neurons)):
                    self._slots.wait()

    # -- one step

    def _step(self, index: int, needed: Index, recent: list[Index], tiles: Index, guess: Ahead) -> Iterator[Group]:
        """Decide, then read in batches: each is computed while the next one is read into the other half."""
        layer, account = self._layers[index], self._ledger.current
        with self._ledger.planning():
            change = layer.policy.step(needed, recent)
            place = self._placed(index, needed, change.misses)
            account.hits += len(needed) - len(change.misses)
            account.misses += len(change.misses)
        arrived = np.zeros(len(change.insert_records), dtype=bool)
        if len(change.move_to):
            self._slots.rearrange(index, change)
        if self._guesses is not None:
            self._guesses.take(index, place)
            self._insert(index, change, place, arrived)
        with self._ledger.planning():
            missing = change.misses[place[change.misses] == MISSING]
            batches = self._batches(layer, missing, tiles, place)
            account.useful_bytes += len(missing) * layer.geometry.record_bytes
        following: Need | None = None
        for i, batch in enumerate(batches):
            for ahead in batches[i : i + 2]:
                self._submit(ahead)
            if i == len(batches) - 1:
                following = guess()
            if batch.reading is not None:
                self._reads.wait(batch.reading)
            if following is not None:
                self._guess(index + 1, following)
            place[batch.plan.records] = self._staging + batch.half * self._half + batch.plan.places
            self._insert(index, change, place, arrived)
            with self._ledger.planning():
                some = tiles[batch.first : batch.last]
                offsets = _offsets(layer.geometry, some, place)
            yield Group(batch.first, batch.last, self._arena, some, offsets)

    def _guess(self, index: int, need: Need) -> None:
        """Read what of these has no slot before the layer asks for it."""
        if self._guesses is not None and index < len(self._layers):
            layer = self._layers[index]
            with self._ledger.planning():
                records = layer.geometry.records_of(need.selection.needed)
                absent = records[layer.policy.slot_of[records] < 0]
            self._guesses.submit(index, absent)

    def _placed(self, index: int, needed: Index, misses: Index) -> Index:
        """Address (`model.slots`) at which each needed record starts, MISSING for those that have not arrived; it is
        filled in as they do, and says nothing of other records. There is one such table, valid for one step."""
        layer = self._layers[index]
        place = self._places[: layer.geometry.records]
        place.fill(0)
        place[needed] = self._slots.address(index, layer.policy.slot_of[needed])
        place[misses] = MISSING
        return place

    def _batches(self, layer: _Layer, missing: Index, tiles: Index, place: Index) -> list[_Batch]:
        """Tiles grouped so that what each group misses fits into half of the staging buffer."""
        g, io = layer.geometry, self._run.io
        knobs = {
            "record_bytes": g.record_bytes, "offset": g.offset, "alignment": self._alignment,
            "max_extent": io.max_extent,
        }  # fmt: skip
        found = [(0, len(tiles), plan_records(missing, **knobs, max_gap=io.max_gap))]
        if found[0][2].extents.total > self._half:
            found = group_tiles(_wanted(g, tiles, place), budget=self._half, **knobs, max_gap=io.max_gap)
        if io.objective == "time":
            limits = knobs | {"in_flight": io.in_flight, "budget": self._half}
            found = [(a, b, cheapest(plan, io.disk, **limits)) for a, b, plan in found]
        return [_Batch(a, b, plan, i % 2) for i, (a, b, plan) in enumerate(found)]

    def _submit(self, batch: _Batch) -> None:
        extents = batch.plan.extents
        if batch.reading is None and extents.total:
            target = self._arena[self._staging + batch.half * self._half :][: extents.total]
            batch.reading = self._reads.submit(extents, target)

    # -- slots

    def _insert(self, index: int, change: Change, place: Index, arrived: npt.NDArray[np.bool_]) -> None:
        """Copy the records that stay, and have arrived since the last call, to their slots."""
        with self._ledger.planning():
            at = place[change.insert_records]
            here = np.flatnonzero((at != MISSING) & ~arrived)
            arrived[here] = True
        if len(here):
            self._slots.copy(index, change.insert_slots[here], at[here])


def _wanted(g: Geometry, tiles: Index, place: Index) -> list[Index]:
    """The records of each tile whose `place` is MISSING, sorted and distinct."""
    record = g.positions(tiles) // g.bundles_per_record
    tile = np.arange(len(tiles))[:, None]
    pairs = np.unique((tile * g.records + record)[(place[record] == MISSING) & (tiles >= 0)])
    return np.split(pairs % g.records, np.searchsorted(pairs, tile[1:, 0] * g.records))


def _offsets(g: Geometry, tiles: Index, place: Index) -> Index:
    """Address at which each neuron's bundle starts, 0 (the zeros) for padding; `place` is of the records."""
    position = g.positions(tiles)  # of padding, anybody's
    if g.bundles_per_record == 1:
        start = place[position]
    else:
        record, within = np.divmod(position, g.bundles_per_record)
        start = place[record] + within * g.bundle_bytes
    return np.where(tiles >= 0, start, 0)
