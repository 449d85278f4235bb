"""FFN neurons: slots, the windowed cache over them, and the reads that fill them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend
from flashinfer.cache import AlwaysMiss, Change, DeviceTieredCache, Policy, device_cache, tiered_cache, window_cache
from flashinfer.config import RunConfig
from flashinfer.io import Reader
from flashinfer.ledger import Ledger
from flashinfer.memory import Mode, Plan
from flashinfer.model.ahead import MISSING, Guesses
from flashinfer.model.arena import Arena
from flashinfer.model.batches import Batch, Batches, offsets_of
from flashinfer.model.reads import Reads
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
    batches: Batches
    policy: Policy


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
        backend: Backend,
    ) -> None:
        self._backend = backend
        self._run, self._ledger, self._mode, self._slots = run, ledger, mode, slots
        self._reads, self._alignment = Reads(reader, NEURON_FILE, "neurons", ledger), reader.alignment
        self._half, self._staging, self._arena = plan.neuron_staging, arena.staging, arena.bytes
        self._layers = [
            _Layer(g, Batches(g, run.io, reader.alignment, plan.neuron_staging), self._make_policy(i, g))
            for i, g in enumerate(geometries)
        ]
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
        if not near:
            return window_cache(geometry.records, slots, window=window, retention=retention)
        records, far = geometry.records, slots - near
        return self._there(geometry, near, far) or tiered_cache(records, near, far, window=window, retention=retention)

    def _there(self, g: Geometry, near: int, far: int) -> Policy | None:
        """The policy where arithmetic is, which knows there who is needed; of experts the host does."""
        if g.unit:
            return None
        cache = self._run.cache
        record, within = np.divmod(g.positions(np.arange(g.neurons)), g.bundles_per_record)
        return device_cache(
            self._backend, g.records, near, far, window=cache.window, retention=cache.retention,
            record_of=record, within=within * g.bundle_bytes,
        )  # fmt: skip

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
        g, policy = self._layers[index].geometry, self._layers[index].policy
        if isinstance(policy, DeviceTieredCache) and need.flags is not None:
            yield from self._whole(index, self._chosen_step(index, policy, need, guess))
            return
        with self._ledger.planning():
            recent = [g.records_of(neurons) for neurons in need.selection.recent]
            needed = g.records_of(need.selection.needed)
        yield from self._whole(index, self._step(index, needed, recent, need.tiles, guess))

    def _settle(self) -> None:
        self._reads.settle()
        if self._guesses is not None:
            self._guesses.settle()

    def _whole(self, index: int, step: Iterator[Group]) -> Iterator[Group]:
        """A step that is made to its end, or else leaves the layer as it was at the beginning."""
        self._reads.settle()
        layer = self._layers[index]
        try:
            yield from step
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
                step = self._step(index, np.flatnonzero(wanted), recent, decode_tiles(neurons), no_guess)
                for _ in self._whole(index, step):
                    self._slots.wait()

    # -- one step

    def _step(self, index: int, needed: Index, recent: list[Index], tiles: Index, guess: Ahead) -> Iterator[Group]:
        """Decide, then read in batches: each is computed while the next one is read into the other half."""
        layer = self._layers[index]
        with self._ledger.planning():
            change = layer.policy.step(needed, recent)
            place = self._placed(index, needed, change.misses)
        arrived = self._begin(index, len(needed), change, place)
        with self._ledger.planning():
            batches = layer.batches.split(tiles, self._missing(index, change, place), place)
        for batch in self._read(index, batches, change, place, arrived, guess):
            with self._ledger.planning():
                some = tiles[batch.first : batch.last]
                offsets = offsets_of(layer.geometry, some, place)
            yield Group(batch.first, batch.last, self._arena, some, offsets)

    def _chosen_step(self, index: int, policy: DeviceTieredCache, need: Need, guess: Ahead) -> Iterator[Group]:
        """The same of one token where only the device knows who is needed: all at once, if it fits."""
        layer, g = self._layers[index], self._layers[index].geometry
        with self._ledger.planning():
            policy.core.ask(need.flags)
        policy.core.wait()  # arithmetic takes this time, not planning
        with self._ledger.planning():
            chosen = policy.answer()
            place = self._placed(index, chosen.far, chosen.change.misses)
        arrived = self._begin(index, chosen.records, chosen.change, place)
        with self._ledger.planning():
            missing, elsewhere = self._missing(index, chosen.change, place), chosen.elsewhere
            whole = layer.batches.together(chosen.tiles, missing)
            fits = whole is not None and self._slots.passes(index, len(elsewhere))
            batches = [whole] if whole is not None else []
            if not fits:
                needed = g.records_of(need.selection.needed)
                rest = needed[place[needed] == 0]
                place[rest] = self._slots.address(index, policy.slot_of[rest])
                batches = layer.batches.split(need.tiles, missing, place)
        for batch in self._read(index, batches, chosen.change, place, arrived, guess):
            if fits:
                yield self._slots.group(index, policy.core, chosen, elsewhere, place[elsewhere])
            else:
                some = need.tiles[batch.first : batch.last]
                yield Group(batch.first, batch.last, self._arena, some, offsets_of(g, some, place))

    def _begin(self, index: int, needed: int, change: Change, place: Index) -> npt.NDArray[np.bool_]:
        """Count what is needed, make the moves, take what was guessed: which of the inserts are done."""
        account = self._ledger.current
        account.hits += needed - len(change.misses)
        account.misses += len(change.misses)
        arrived = np.zeros(len(change.insert_records), dtype=bool)
        if len(change.move_to):
            self._slots.rearrange(index, change)
        if self._guesses is not None:
            self._guesses.take(index, place)
            self._insert(index, change, place, arrived)
        return arrived

    def _missing(self, index: int, change: Change, place: Index) -> Index:
        """Whom to read now."""
        missing: Index = change.misses[place[change.misses] == MISSING]
        self._ledger.current.useful_bytes += len(missing) * self._layers[index].geometry.record_bytes
        return missing

    def _read(
        self, index: int, batches: list[Batch], change: Change, place: Index, arrived: npt.NDArray[np.bool_],
        guess: Ahead,
    ) -> Iterator[Batch]:  # fmt: skip
        """Each batch when its records have arrived, and those that stay are copied to their slots."""
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
            yield batch

    def _guess(self, index: int, need: Need) -> None:
        """Read what of these has no slot before the layer asks for it."""
        if self._guesses is not None and index < len(self._layers):
            layer = self._layers[index]
            with self._ledger.planning():
                absent = self._absent(layer, need)
            self._slots.wait()  # what was guessed before may be on its way
            self._guesses.submit(index, absent)

    def _absent(self, layer: _Layer, need: Need) -> Index:
        """Records that are needed and have no slot."""
        if isinstance(layer.policy, DeviceTieredCache) and need.flags is not None:
            return layer.policy.core.absent(need.flags)
        records = layer.geometry.records_of(need.selection.needed)
        absent: Index = records[layer.policy.slot_of[records] < 0]
        return absent

    def _placed(self, index: int, needed: Index, misses: Index) -> Index:
        """Address (`model.slots`) at which each needed record starts, MISSING for those that have not arrived; it is
        filled in as they do, and says nothing of other records. There is one such table, valid for one step."""
        layer = self._layers[index]
        place = self._places[: layer.geometry.records]
        place.fill(0)
        place[needed] = self._slots.address(index, layer.policy.slot_of[needed])
        place[misses] = MISSING
        return place

    def _submit(self, batch: Batch) -> None:
        extents = batch.plan.extents
        if batch.reading is None and extents.total:
            self._slots.wait()  # what was read there before may be on its way
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
            slots = change.insert_slots[here]
            self._slots.copy(index, slots, at[here])
            near = slots < self._slots.near[index]  # not to be copied there twice
            place[change.insert_records[here[near]]] = self._slots.address(index, slots[near])
