"""Who has which slot, kept where arithmetic is: what a cache of two tiers asks of a backend that can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.backend.base import Buffer, Flags

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Counting:
    """How a cache counts use and compares claims (`cache.heat`, `cache.tiers`).

    half_life: tokens after which a use weighs half. piles: of them per halving. steps, added: a table of what a score
    gains from a lower one, so many entries per halving between them. most_records, most_piles: bits of a claim.
    """

    half_life: float
    piles: int
    steps: int
    added: npt.NDArray[np.float32]
    most_records: int
    most_piles: int


@dataclass(frozen=True)
class Tiers:
    """A cache of two tiers for a layer: its records, near and far slots, tokens of the window, and whether what is used
    most stays beyond them.

    record_of, within: of each neuron the record, and the byte in it at which its bundle begins.
    """

    records: int
    near: int
    far: int
    window: int
    keeps: bool
    counting: Counting
    record_of: Index
    within: Index


class Bookkeeping(Protocol):
    """Slots of a layer. It decides what `cache.tiers.TieredCache` does, in operations where arithmetic is.

    A step gives rows `[n, 3]` on the host, of records in order: record, its slot before, its slot from now on, -1 for
    none. Of these are all that are needed and were not near, and all that went from one tier to the other.
    """

    def slots(self) -> Index:
        """Slot of each record, -1 for none, on the host."""
        ...

    def step(self, needed: Index, recent: Sequence[Index]) -> Index:
        """As `cache.policy.Policy.step`, for records that are known on the host. Rows."""
        ...

    def ask(self, flags: Flags) -> None:
        """Begin a step of one token, `[1, neurons]`. The host waits for nothing."""
        ...

    def wait(self) -> None:
        """Block until all arithmetic from before the step has ended."""
        ...

    def answer(self) -> tuple[Index, int, int]:
        """Rows of the step that was begun, and how many neurons and records are needed. Here the host waits for the
        device, and nothing more comes to it."""
        ...

    def absent(self, flags: Flags) -> Index:
        """The records that one token needs and that have no slot, on the host. Nothing changes."""
        ...

    def tiles(self, count: int) -> Buffer:
        """The neurons chosen last, so many, `[tiles, TILE_NEURONS]`, as `model.weights.decode_tiles` has them. Valid
        until the next choice."""
        ...

    def offsets(self, tiles: Buffer, base: int, size: int, records: Index, places: Index) -> Buffer:
        """Where the bundles of such tiles begin in a memory whose near slots of `size` bytes begin at `base`, and in
        which these records, which are not near, are at these places."""
        ...

    def preload(self, records: Index) -> Index:
        """As `cache.policy.Policy.preload`; they fit."""
        ...

    def window(self) -> list[Index]:
        """As `cache.policy.Policy.window`."""
        ...

    def effective_window(self) -> int:
        """As `cache.policy.Policy.effective_window`."""
        ...
