"""The stream's ring: the bytes of a piece are there and stay while it is used, whatever is read meanwhile."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.errors import StoreReadError
from flashinfer.io import Extents, plan_range
from flashinfer.ledger import Ledger
from flashinfer.model.reads import Reads
from flashinfer.model.stream import Key, Piece, Stream
from tests.engine.strict_reader import StrictReader

UNIT = 512
Bytes = npt.NDArray[np.uint8]


class Watched(StrictReader):
    """Forbids, too, reads to the bytes that are in use; counts the reads that are under way."""

    held: Bytes | None = None

    def submit(self, file: int, extents: Extents, target: Bytes):
        assert self.held is None or not np.may_share_memory(self.held, target), "read over what is in use"
        return super().submit(file, extents, target)

    @property
    def under_way(self) -> int:
        return sum(not pending.done for pending in self._pending)


class Streaming:
    """A stream of pieces of two files, with `head` of them at the end for the head; every piece has other bytes."""

    def __init__(self, sizes: list[int], ring: int, head: int = 0) -> None:
        random = np.random.default_rng(len(sizes))
        blobs = [random.integers(0, 256, UNIT * sum(sizes), dtype=np.uint8) for _ in range(2)]
        self.reader = Watched(blobs, alignment=UNIT)
        files = [Reads(self.reader, file, str(file), Ledger()) for file in range(2)]
        self.pieces, self.expected, at = [], [], 0
        for i, size in enumerate(sizes):
            extents = plan_range(at, UNIT * size, alignment=UNIT, max_extent=4 * UNIT).extents
            logits = i >= len(sizes) - head
            self.pieces.append(Piece(("piece", i), files[i % 2], extents, UNIT * size, logits))
            self.expected.append(blobs[i % 2][at : at + UNIT * size])
            at += UNIT * size
        memory = np.zeros(ring + UNIT, dtype=np.uint8)
        start = -memory.ctypes.data % UNIT
        self.ring = memory[start : start + ring]
        self.stream = Stream(self.ring, self.pieces)
        self.turned = False  # whether the head was announced and then was not, or the other way round

    def take(self, i: int) -> None:
        self.leave()
        start = self.stream.take(self.pieces[i].key)
        self.reader.held, self.now = self.ring[start : start + len(self.expected[i])], i
        self.check()

    def failure_of_taking(self, i: int) -> type[BaseException] | None:
        try:
            self.take(i)
        except (StoreReadError, KeyboardInterrupt) as error:
            return type(error)
        return None

    def leave(self) -> None:
        """The bytes are those of the piece to the last."""
        if self.reader.held is not None:
            self.check()
        self.reader.held = None

    def release(self) -> None:
        self.leave()
        self.stream.release()

    def check(self) -> None:
        assert np.array_equal(self.reader.held, self.expected[self.now])
        places = [*self.stream._ahead, *([self.stream._held] if self.stream._held else [])]
        assert len(places) <= len(self.pieces)
        if not self.turned:
            assert len({place.index for place in places}) == len(places)
        taken = np.zeros(len(self.ring) // UNIT, dtype=int)
        for place in places:
            assert place.start + place.size <= len(self.ring)
            taken[place.start // UNIT : (place.start + place.size) // UNIT] += 1
        assert taken.max(initial=0) <= 1


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=9)


@st.composite
def streams(draw) -> Streaming:
    found = draw(sizes)
    ring = UNIT * draw(st.integers(2 * max(found), 3 * max(found) + sum(found)))
    return Streaming(found, ring, draw(st.integers(0, len(found))))


def noted_reads(s: Streaming) -> list[Key]:
    """From now on: the keys of pieces in the order their reads are submitted."""
    keys: list[Key] = []
    submit = s.stream._submit

    def noted(index: int, start: int) -> None:
        keys.append(s.pieces[index].key)
        submit(index, start)

    s.stream._submit = noted  # type: ignore[method-assign]
    return keys


ACTIONS = ["next", "next", "next", "next", "release", "skip", "fail", "interrupt", "head", "settle"]


@settings(max_examples=150, deadline=None)
@given(s=streams(), data=st.data())
def test_what_is_taken_is_there_until_it_is_left(s: Streaming, data: st.DataObject) -> None:
    """Whatever comes between: pieces skipped, reads that fail, Ctrl-C in a wait, a head that follows or does not."""
    at, follows, spoilt = 0, True, False
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=40)):
        if action == "release":
            s.release()
        elif action == "settle":
            s.leave()
            s.stream.settle()
            assert s.reader.under_way == 0
        elif action == "head":
            follows, s.turned = not follows, True
            s.stream.expect_head(follows)
        else:
            if action == "skip":
                at = data.draw(st.integers(0, len(s.pieces) - 1))
            if action == "fail":
                spoilt = True
                s.reader.fail_at = {(file, b) for file in range(2) for b in range(0, len(s.reader.blobs[0]), UNIT)}
            elif action == "interrupt":
                s.reader.interrupt_at = 0
            failure = s.failure_of_taking(at)
            if failure is None:
                at = s.stream._after(at)
            else:
                assert spoilt if failure is StoreReadError else action == "interrupt"
                spoilt = spoilt and action == "interrupt"  # nothing of what was read ahead is used after a failure
                assert s.stream._held is None
                assert not s.stream._ahead
                at = data.draw(st.sampled_from([at, 0]))
            s.reader.fail_at, s.reader.interrupt_at = set(), None
    s.leave()
    s.stream.close()
    assert s.reader.under_way == 0


@settings(max_examples=100, deadline=None)
@given(s=streams(), rounds=st.integers(1, 4), release=st.sampled_from(["each", "last", "never"]))
def test_in_order_every_piece_is_read_once_a_round(s: Streaming, rounds: int, release: str) -> None:
    """And in order: what is taken, then what is under way for the round to come, less than all of it."""
    keys = noted_reads(s)
    for _ in range(rounds):
        for i in range(len(s.pieces)):
            s.take(i)
            if release == "each" or (release == "last" and i == len(s.pieces) - 1):
                s.release()
    ahead = len(s.stream._ahead)
    assert ahead <= len(s.pieces)
    assert keys == [s.pieces[i % len(s.pieces)].key for i in range(rounds * len(s.pieces) + ahead)]
    assert s.reader.under_way <= ahead


@settings(max_examples=60, deadline=None)
@given(s=streams(), chunks=st.integers(1, 4))
def test_the_head_is_read_where_it_follows_and_nowhere_else(s: Streaming, chunks: int) -> None:
    """As in a prompt in chunks: only the last of them is followed by the head."""
    keys = noted_reads(s)
    body = [i for i, piece in enumerate(s.pieces) if not piece.logits]
    head = [i for i, piece in enumerate(s.pieces) if piece.logits]
    order = []
    for chunk in range(chunks):
        s.stream.expect_head(chunk == chunks - 1)
        for i in [*body, *(head if chunk == chunks - 1 else [])]:
            order.append(s.pieces[i].key)
            s.take(i)
        s.release()
    ahead = len(s.stream._ahead)
    assert keys == [*order, *(s.pieces[i % len(s.pieces)].key for i in range(ahead))]


@settings(max_examples=60, deadline=None)
@given(found=st.lists(st.integers(1, 12), min_size=2, max_size=9), more=st.integers(0, 20))
def test_one_is_under_way_while_one_is_used(found: list[int], more: int) -> None:
    """Where the ring holds three of the largest, wherever the end of it cuts; or two, where all are of one size."""
    even = [max(found)] * len(found)
    for sized, ring in ((found, 3 * max(found)), (even, 2 * max(found))):
        s = Streaming(sized, UNIT * (ring + more))
        for i in [*range(len(sized))] * 3:
            s.take(i)
            assert s.stream._ahead
            assert s.stream._ahead[0].index == (i + 1) % len(sized)
            assert s.reader.under_way >= 1


@settings(max_examples=60, deadline=None)
@given(s=streams())
def test_between_steps_the_next_piece_is_under_way(s: Streaming) -> None:
    """However small the ring: what was used last makes room for what comes next."""
    for i in [*range(len(s.pieces))] * 2:
        s.take(i)
        s.release()
        assert s.stream._ahead
        assert s.reader.under_way >= 1


def test_an_interrupt_between_a_read_and_its_note_leaves_none_behind_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when a read is under way that the ring does not know of yet: its place is not read into before it ends."""
    for at in range(5):
        s = Streaming([4, 4, 4, 4], 13 * UNIT)
        submit, calls = Reads.submit, iter(range(100))

        def interrupted(*arguments, submit=submit, calls=calls, at=at):
            reading = submit(*arguments)
            if next(calls) == at:
                raise KeyboardInterrupt
            return reading

        used = []

        def use_all(s=s, used=used) -> None:
            for i in [*range(4)] * 2:
                s.take(i)
                used.append(i)
                s.release()

        with monkeypatch.context() as patch:
            patch.setattr(Reads, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                use_all()
        s.leave()
        for i in range(len(used), len(used) + 8):
            s.take(i % 4)
