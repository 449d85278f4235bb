"""What every copy engine must do. An engine's test class inherits from `CopiesConformance`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flashinfer.backend import Copies
from flashinfer.errors import DeviceError


def index(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def random_bytes(seed: int, size: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


class CopiesConformance:
    """`make` gives an engine; `look` the bytes of device memory as arithmetic would find them now."""

    def make(self) -> Copies:
        raise NotImplementedError

    def look(self, memory: Any) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def copies(self) -> Iterator[Copies]:
        made = self.make()
        yield made
        made.close()

    def test_new_memory_is_zeros(self, copies: Copies) -> None:
        assert not self.look(copies.allocate(10_000)).any()

    @pytest.mark.parametrize(("count", "size"), [(0, 8), (1, 1), (7, 512), (40, 4096), (300, 24)])
    def test_up_and_down_again(self, copies: Copies, count: int, size: int) -> None:
        """Records go anywhere, and what lies between them stays."""
        rng = np.random.default_rng(count)
        source, back = random_bytes(1, max(1, 2 * count * size)), random_bytes(2, max(1, 2 * count * size))
        memory, expected = copies.allocate(len(source)), back.copy()
        at, to, home = (rng.permutation(2 * count)[:count] * size for _ in range(3))
        copies.pin(source)
        copies.pin(back)
        copies.upload(memory, to, source, at, size)
        copies.lead()
        there = self.look(memory)
        for a, b in zip(at, to, strict=True):
            assert np.array_equal(there[b : b + size], source[a : a + size])
        assert np.count_nonzero(there) == sum(np.count_nonzero(source[a : a + size]) for a in at)
        copies.download(back, home, memory, to, size)
        copies.wait()
        for a, h in zip(at, home, strict=True):
            expected[h : h + size] = source[a : a + size]
        assert np.array_equal(back, expected)

    def test_neighbours_are_one_transfer(self, copies: Copies) -> None:
        memory, source = copies.allocate(100), random_bytes(1, 100)
        assert copies.upload(memory, index(0, 10, 20), source, index(50, 60, 70), 10) == 1
        assert copies.upload(memory, index(0, 10, 30), source, index(50, 60, 70), 10) == 2
        assert copies.upload(memory, index(0, 10, 20), source, index(70, 60, 50), 10) == 3
        assert copies.upload(memory, index(), source, index(), 10) == 0
        copies.wait()
        assert copies.download(source, index(0, 10), memory, index(0, 10), 10) == 1
        copies.wait()

    def test_within_the_device(self, copies: Copies) -> None:
        memory, source = copies.allocate(64), random_bytes(1, 64)
        copies.upload(memory, index(0), source, index(0), 64)
        copies.move(memory, index(0, 48), index(16, 32), 8)
        copies.lead()
        expected = source.copy()
        expected[0:8], expected[48:56] = source[16:24], source[32:40]
        assert np.array_equal(self.look(memory), expected)

    def test_the_order_is_that_of_the_calls(self, copies: Copies) -> None:
        """An exchange of two records through a third place of the device, each step resting on the one before."""
        memory, host = copies.allocate(30), random_bytes(1, 20)
        first, second = host[:10].copy(), host[10:].copy()
        copies.upload(memory, index(0), host, index(0), 10)
        copies.move(memory, index(20), index(0), 10)
        copies.upload(memory, index(0), host, index(10), 10)
        copies.download(host, index(10), memory, index(20), 10)
        copies.wait()
        assert np.array_equal(host[10:], first)
        assert np.array_equal(self.look(memory)[:10], second)

    def test_what_is_taken_away_is_taken_before_something_new_comes(self, copies: Copies) -> None:
        """Two records leave their places, one for the host, one for elsewhere there, and others come."""
        memory, old, new = copies.allocate(30), random_bytes(1, 20), random_bytes(2, 20)
        copies.upload(memory, index(0), old, index(0), 20)
        copies.wait()
        home = np.zeros(10, dtype=np.uint8)
        copies.download(home, index(0), memory, index(0), 10)
        copies.move(memory, index(20), index(10), 10)
        copies.upload(memory, index(0), new, index(0), 20)
        copies.wait()
        assert np.array_equal(home, old[:10])
        assert np.array_equal(self.look(memory), np.concatenate((new, old[10:])))

    def test_after_waiting_the_source_is_free(self, copies: Copies) -> None:
        memory, source = copies.allocate(1 << 16), random_bytes(1, 1 << 16)
        kept = source.copy()
        copies.upload(memory, index(0), source, index(0), len(source))
        copies.wait()
        source[:] = 0
        assert np.array_equal(self.look(memory), kept)

    def test_a_slice_is_the_same_memory(self, copies: Copies) -> None:
        memory, source = copies.allocate(40), random_bytes(1, 10)
        copies.upload(memory, index(20), source, index(0), 10)
        copies.lead()
        assert np.array_equal(self.look(memory[20:30]), source)

    def test_following_arithmetic(self, copies: Copies) -> None:
        """Nothing to be seen where arithmetic ends with its call; the order of copies stays."""
        memory, source = copies.allocate(10), random_bytes(1, 10)
        mark = copies.mark()
        copies.follow(mark)
        copies.upload(memory, index(0), source, index(0), 10)
        copies.follow(copies.mark())
        copies.lead()
        assert np.array_equal(self.look(memory), source)

    def test_beyond_the_limit_there_is_nothing(self, copies: Copies) -> None:
        copies.limit(copies.overhead + (4 << 20))
        kept = copies.allocate(1 << 20)
        with pytest.raises(DeviceError, match="memory"):
            copies.allocate(1 << 30)
        assert not self.look(kept).any()

    def test_there_is_more_than_the_overhead(self, copies: Copies) -> None:
        assert copies.available() > copies.overhead

    def test_closing_twice(self, copies: Copies) -> None:
        copies.close()
        copies.close()
