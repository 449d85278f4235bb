"""Records and slots, both ways: a bijection that stays packed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]
EMPTY: Index = np.empty(0, dtype=np.int64)


class SlotMap:
    """The occupied slots are exactly 0..used-1, so that they can be walked as one block.

    Holes are closed as in "LLM in a flash" (arXiv 2312.11514, section 3.3): new records go into the holes
    first, then to the end; what is left of the holes is filled from the end.

    Attributes:
        slots: how many there are.
        used: how many are occupied.
        slot_of: int64 `[records]`, the slot of each record or -1.
    """

    def __init__(self, records: int, slots: int) -> None:
        self.slots = slots
        self.used = 0
        self.slot_of: Index = np.full(records, -1, dtype=np.int64)
        self._record_in: Index = np.full(min(slots, records), -1, dtype=np.int64)

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._record_in) - self.used

    def replace(self, drop: Index, insert: Index) -> tuple[Index, Index, Index]:
        """Drop resident records, insert others; returns `(insert_slots, move_from, move_to)`.

        Moves come before inserts. Every move goes from a slot at or beyond the new `used` to a hole below it,
        so no source is also a target and the moves may be done in any order or at once.
        """
        holes = np.sort(self.slot_of[drop])
        used = self.used + len(insert) - len(drop)
        fill = min(len(holes), len(insert))
        slots = np.concatenate((holes[:fill], np.arange(self.used, self.used + len(insert) - fill)))
        self.slot_of[drop] = -1
        move_from = move_to = EMPTY
        if used < self.used:
            self._record_in[holes] = -1
            move_from = used + np.flatnonzero(self._record_in[used : self.used] >= 0)
            move_to = holes[fill : fill + len(move_from)]
            moved = self._record_in[move_from]
            self._record_in[move_to] = moved
            self.slot_of[moved] = move_to
            self._record_in[used : self.used] = -1
        self._record_in[slots] = insert
        self.slot_of[insert] = slots
        self.used = used
        return slots, move_from, move_to
