"""Guesses for the next layer: read while this one computes, given way to what is needed, never trusted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.config import IoConfig
from flashinfer.errors import StoreReadError
from flashinfer.io import Reader, RecordPlan, plan_records
from flashinfer.ledger import Ledger
from flashinfer.model.reads import Reading, Reads
from flashinfer.store import Geometry

Index = npt.NDArray[np.int64]

LATE = 200e-6
"""Seconds a step may wait for guesses before they count as too many."""
GROW, SHRINK = 1.2, 0.7
POOR = 0.3
"""Share of a guess that must come true, or less is guessed."""
MISSING = -1
"""The place of a record that a layer needs and that is nowhere yet."""


@dataclass
class _Guess:
    layer: int
    plan: RecordPlan
    start: int
    reading: Reading


class Guesses:
    """Reads of records that the next layer will probably need, into two halves of a buffer in turn.

    They are submitted once the reads that this layer waits for have ended, and are never more than what lately had
    arrived when the next layer began: so they fill the time in which the disk would stand still. Invariant: the half
    that was taken last is not written to until the next is taken.
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        reader: Reader,
        file: int,
        io: IoConfig,
        memory: npt.NDArray[np.uint8],
        start: int,
        half: int,
        ledger: Ledger,
    ) -> None:
        self._geometries, self._io, self._ledger, self._memory = geometries, io, ledger, memory
        self._reads, self._alignment = Reads(reader, file, "guesses", ledger), reader.alignment
        self._start, self._half, self._turn = start, half, 0
        self._limit = float(half)
        self._guess: _Guess | None = None

    def submit(self, layer: int, records: Index) -> None:
        """Start reading as many of these records as there is time for. Sorted and distinct; none is in a slot."""
        assert self._guess is None
        with self._ledger.planning():
            plan = self._plan(layer, records)
        if not plan.extents.total:
            return
        start = self._start + self._turn * self._half
        self._turn = 1 - self._turn
        reading = self._reads.submit(plan.extents, self._memory[start : start + plan.extents.total])
        self._guess = _Guess(layer, plan, start, reading)
        self._ledger.current.guessed_bytes += plan.extents.total

    def take(self, layer: int, place: Index) -> None:
        """Wait for what had been guessed for the layer, and note where it is.

        place: byte of the arena at which each record starts; those that are MISSING and had been guessed get theirs.
        """
        guess, self._guess = self._guess, None
        if guess is None:
            return
        began = time.perf_counter()
        try:
            self._reads.wait(guess.reading)
        except StoreReadError:  # nobody needs it yet: whoever does reads it again, and is told
            return
        late = time.perf_counter() - began > LATE
        if guess.layer != layer:
            return
        with self._ledger.planning():
            true = place[guess.plan.records] == MISSING
            found = guess.plan.records[true]
            place[found] = guess.start + guess.plan.places[true]
        poor = len(found) < POOR * len(guess.plan.records)
        self._limit = min(float(self._half), self._limit * (SHRINK if late or poor else GROW))
        account, size = self._ledger.current, len(found) * self._geometries[layer].record_bytes
        account.guessed_useful += size
        account.useful_bytes += size

    def settle(self) -> None:
        """Let everything under way end, and forget it."""
        self._guess = None
        self._reads.settle()

    def _plan(self, layer: int, records: Index) -> RecordPlan:
        """As many of the records as fit into the half and the time there is."""
        g = self._geometries[layer]
        room = int(min(self._half, max(self._limit, 2 * self._alignment + g.record_bytes)))
        count = min(len(records), room // g.record_bytes)
        while True:
            plan = plan_records(
                records[:count], record_bytes=g.record_bytes, offset=g.offset, alignment=self._alignment,
                max_gap=self._io.max_gap, max_extent=self._io.max_extent,
            )  # fmt: skip
            if plan.extents.total <= room:
                return plan
            count = count * 7 // 8
