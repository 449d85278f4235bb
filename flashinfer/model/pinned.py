"""FFN neurons where every step needs all of them: some stay in slots for good, the others are streamed in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.config import RunConfig
from flashinfer.io import Reader, RecordPlan, group_tiles
from flashinfer.ledger import Ledger
from flashinfer.memory import Plan
from flashinfer.model.arena import Arena
from flashinfer.model.neurons import NEURON_FILE
from flashinfer.model.reads import Reads
from flashinfer.model.slots import Slots
from flashinfer.model.stream import Piece, Stream
from flashinfer.model.weights import Ahead, Group, Need, no_guess, unit_tiles
from flashinfer.store import Geometry

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Run:
    """Tiles first .. last. `offsets` are addresses (`model.slots`), but those marked `streamed` are bytes of the piece;
    without a piece nothing has to be waited for."""

    first: int
    last: int
    offsets: Index
    streamed: npt.NDArray[np.bool_]
    piece: Piece | None


class PinnedNeurons:
    """All neurons of a model without sparsity (or of a run that uses none) behind `groups`.

    What is read, and in which order, never changes, so it is planned once. LRU would hit nothing on such a scan.
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        reader: Reader,
        plan: Plan,
        run: RunConfig,
        ledger: Ledger,
        arena: Arena,
        slots: Slots,
    ) -> None:
        self._arena, self._ledger, self._slots = arena, ledger, slots
        reads = Reads(reader, NEURON_FILE, "neurons", ledger)
        loaded = [slots.load(i, reads, reader.alignment, run.io.max_extent) for i in range(len(geometries))]
        self._slot_of = [np.argsort(records) for records in loaded]  # of the records that have one
        self._geometries, self._window = geometries, run.cache.window
        self._alignment, self._max_extent, self._budget = reader.alignment, run.io.max_extent, plan.piece
        self._runs = [self._plan(layer, reads) for layer in range(len(geometries))]
        self._stream: Stream | None = None

    def pieces(self, layer: int) -> list[Piece]:
        """What is streamed of a layer, in order of use."""
        return [run.piece for run in self._runs[layer] if run.piece is not None]

    def read_from(self, stream: Stream) -> None:
        """Where the pieces come from."""
        self._stream = stream

    @property
    def effective_window(self) -> int:
        """Nothing is ever exchanged: the window is all tokens, or none."""
        every = all(slots >= g.records for slots, g in zip(self._slots.total, self._geometries, strict=True))
        return self._window if every else 0

    def window(self) -> list[list[Index]]:
        """Nothing is ever exchanged, so there is nothing to bring back."""
        return []

    def warm(self, window: Sequence[Sequence[Index]]) -> None:
        """As `window`: nothing to do."""

    def close(self) -> None:
        """Nothing is under way but what the stream awaits."""

    def groups(self, layer: int, need: Need, guess: Ahead = no_guess) -> Iterator[Group]:
        """See `model.weights.Weights.neurons`; needed are all, tiles are in order. Nothing is left to guess."""
        assert len(need.selection.needed) == self._geometries[layer].neurons
        records, account = self._geometries[layer].records, self._ledger.current
        account.hits += self._slots.total[layer]
        account.misses += records - self._slots.total[layer]
        for run in self._runs[layer]:
            offsets = run.offsets
            if run.piece is not None:
                assert self._stream is not None
                offsets = offsets + run.streamed * (self._arena.ring + self._stream.take(run.piece.key))
            yield Group(run.first, run.last, self._arena.bytes, need.tiles[run.first : run.last], offsets)
        if self._stream is not None and self.pieces(layer):
            self._stream.release()

    def _plan(self, layer: int, reads: Reads) -> list[_Run]:
        g, kept = self._geometries[layer], self._slots.total[layer]
        unit = g.unit or g.neurons
        tiles = unit_tiles(np.arange(-(-g.neurons // unit)), unit, g.neurons)
        missing = [records[records >= kept] for records in (g.records_of(tile[tile >= 0]) for tile in tiles)]
        here = next((i for i, records in enumerate(missing) if len(records)), len(tiles))
        runs = [self._run(layer, tiles, 0, here, None, None)] if here else []
        if here < len(tiles):
            found = group_tiles(
                missing[here:], budget=self._budget, record_bytes=g.record_bytes, offset=g.offset,
                alignment=self._alignment, max_gap=0, max_extent=self._max_extent,
            )  # fmt: skip
            for n, (first, last, plan) in enumerate(found):
                piece = Piece(
                    (f"layers.{layer}.neurons", n), reads, plan.extents, len(plan.records) * g.record_bytes
                ) if len(plan.records) else None  # fmt: skip
                runs.append(self._run(layer, tiles, here + first, here + last, plan, piece))
        return runs

    def _run(
        self, layer: int, tiles: Index, first: int, last: int, plan: RecordPlan | None, piece: Piece | None
    ) -> _Run:
        g, kept, tiles = self._geometries[layer], self._slots.total[layer], tiles[first:last]
        record, within = np.divmod(g.positions(np.maximum(tiles, 0)), g.bundles_per_record)
        start, here = np.zeros_like(record), record < kept
        start[here] = self._slots.address(layer, self._slot_of[layer][record[here]])
        streamed = (tiles >= 0) & (record >= kept)
        if plan is not None and len(plan.records):
            start[streamed] = plan.places_of(record[streamed])
        return _Run(first, last, np.where(tiles >= 0, start + within * g.bundle_bytes, 0), streamed, piece)
