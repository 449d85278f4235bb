"""What passes through a device's halves: arithmetic that is under way is never written over, and goes on meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.backend.copies import HostCopies
from flashinfer.ledger import Ledger
from flashinfer.model.uploads import Uploads

HALF = 64


class Clocked(HostCopies):
    """As if arithmetic ended when it likes: a mark is how many pieces of it were asked for, and a copy waits for those
    that `follow` named. What a half holds is in use by the pieces that were asked for while it was there."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.asked = self.ended = 0
        self.users: dict[int, int] = {}
        self.waited_for_all = 0

    def mark(self) -> Any:
        return self.asked

    def follow(self, mark: Any) -> None:
        self.ended = max(self.ended, mark)

    def upload(self, memory: Any, targets: Any, source: Any, sources: Any, size: int) -> int:
        for half in {int(at) // HALF for at in targets}:
            assert self.users.get(half, 0) <= self.ended, "arithmetic under way is written over"
        self.waited_for_all += self.ended == self.asked > 0
        return super().upload(memory, targets, source, sources, size)

    def compute(self, at: int) -> None:
        """Arithmetic on what lies there."""
        self.asked += 1
        self.users[at // HALF] = self.asked


def made() -> tuple[Clocked, Uploads]:
    copies = Clocked()
    arena: Any = SimpleNamespace(half=HALF, halves=(0, HALF), memory=copies.allocate(2 * HALF))
    return copies, Uploads(copies, arena, Ledger())


@given(st.lists(st.integers(0, 3), max_size=30), st.binary(min_size=1, max_size=HALF))
def test_a_half_is_written_to_after_the_arithmetic_on_it(pieces: list[int], raw: bytes) -> None:
    copies, uploads = made()
    for count in pieces:
        start = uploads.turn()
        uploads.put(np.array([start]), np.frombuffer(raw, dtype=np.uint8), np.array([0]), len(raw))
        for _ in range(count):
            copies.compute(start)


def test_copies_do_not_wait_for_the_arithmetic_on_the_other_half() -> None:
    """Else the next part would not be copied while this one is computed."""
    copies, uploads = made()
    for i in range(10):
        there = uploads.passing(np.full(HALF, i, dtype=np.uint8))
        assert (there == i).all()
        copies.compute(uploads.arena.halves[(i + 1) % 2])
    assert copies.waited_for_all == 0
    assert copies.ended == 8


def test_what_is_copied_is_counted() -> None:
    _, uploads = made()
    raw = np.arange(HALF, dtype=np.uint8)
    uploads.put(np.array([0, 8, 40]), raw, np.array([8, 16, 0]), 8)
    uploads.fetch(raw, np.array([0]), np.array([40]), 8)
    uploads.move(np.array([0]), np.array([64]), 8)
    account = uploads._ledger.current
    assert (account.copied_bytes, account.copied_back_bytes, account.copies) == (24, 8, 3)
