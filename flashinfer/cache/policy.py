"""What a cache policy is: which records are in which slots. It knows records and slots, no bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """What one step asks of the slots, to be carried out in this order.

    moves: slot `move_from[i]` is copied to `move_to[i]` (swap-delete: the hole is filled from the end; between tiers of
    slots, where records change places, as `tiers.exchange` has it).
    inserts: record `insert_records[i]`, just read, is copied to slot `insert_slots[i]`.
    misses: sorted records that were in no slot before this step and must be read now. Those of them not in
    `insert_records` are transient: computed from the read buffer, kept nowhere.
    """

    misses: Index
    insert_records: Index
    insert_slots: Index
    move_from: Index
    move_to: Index


class Policy(Protocol):
    """Bookkeeping of one layer's slots.

    Invariants: the occupied slots are exactly 0..used-1; `slot_of[r]` is the slot of record r or -1;
    used <= slots. A step never removes a record it was told is needed.
    """

    @property
    def slots(self) -> int:
        """Places there are."""
        ...

    @property
    def used(self) -> int:
        """Places occupied."""
        ...

    @property
    def slot_of(self) -> npt.NDArray[np.int64]:
        """Slot of each record, -1 for none; not to be written to."""
        ...

    def step(self, needed: Index, recent: Sequence[Index] = ()) -> Change:
        """Account for one decode token or one prefill chunk.

        needed: sorted distinct records the step will use. recent: for a chunk of several tokens, the sorted
        record sets of its last tokens, oldest first (at most the window's length is looked at; each a subset
        of `needed`); empty means one token whose set is `needed`. The arrays are kept, not copied.
        Mutates the bookkeeping as if the inserts were already done: a caller whose reads then fail must start
        over with a new policy.
        """
        ...

    def preload(self, records: Index) -> Index:
        """Take these records into free slots; returns the slots.

        They are distinct, none is resident, and they are at most the free slots: ValueError otherwise.
        """
        ...

    @property
    def window(self) -> list[Index]:
        """The record sets of the last tokens, oldest first, at most the window's length."""
        ...

    @property
    def effective_window(self) -> int:
        """How many of the last tokens have their whole active set resident, at most the window."""
        ...
