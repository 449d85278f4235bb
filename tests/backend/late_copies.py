"""A copy engine that does nothing before it must: who forgets to wait finds garbage, or is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashinfer.backend.copies import HostCopies, runs

GARBAGE = 0xA5
"""As a float it is small, and not zero."""


class LateCopies(HostCopies):
    """As HostCopies, but copies are made when somebody waits for them, or garbage is to be put where one of them still
    reads; until then their targets hold garbage. What the host copies from it must not change before it waits itself:
    that is looked at then."""

    def __init__(self, available: int) -> None:
        super().__init__(available)
        self._asked: list[Callable[[], int]] = []
        self._sources: list[tuple[Any, Any, Any] | None] = []
        self._reads: list[tuple[Any, int]] = []  # what copies that were not made yet read of the device's memory

    def upload(self, memory: Any, targets: Any, source: Any, sources: Any, size: int) -> int:
        if any(overlap(read, length, targets, size) for read, length in self._reads):
            self.lead()
        spoil(memory, targets, size)
        self._sources.append((source, sources, taken(source, sources, size)))
        self._asked.append(lambda: super(LateCopies, self).upload(memory, targets, source, sources, size))
        return len(list(runs(targets, sources, size)))

    def download(self, target: Any, targets: Any, memory: Any, sources: Any, size: int) -> int:
        before = len(self._sources)

        def copied() -> int:
            self._look(before)  # what was asked for earlier has ended when this begins
            return super(LateCopies, self).download(target, targets, memory, sources, size)

        self._reads.append((sources, size))
        self._asked.append(copied)
        return len(list(runs(targets, sources, size)))

    def move(self, memory: Any, targets: Any, sources: Any, size: int) -> None:
        def moved() -> int:
            super(LateCopies, self).move(memory, targets, sources, size)
            return 0

        self._reads.append((sources, size))
        self._asked.append(moved)

    def lead(self) -> None:
        asked, self._asked, self._reads = self._asked, [], []
        for copy in asked:
            copy()

    def wait(self) -> None:
        self.lead()
        self._look(len(self._sources))
        self._sources = []

    def _look(self, count: int) -> None:
        """Whether the sources of the first so many uploads are as they were; they may change from now on."""
        some, self._sources[:count] = self._sources[:count], [None] * count
        for source, at, before in filter(None, some):
            assert np.array_equal(taken(source, at, before.shape[1]), before), "written to while it was copied from"

    def close(self) -> None:
        self.wait()


def taken(memory: Any, places: Any, size: int) -> Any:
    """What lies at these places, `[n, size]`."""
    return np.stack([memory[at : at + size] for at in places.tolist()]) if len(places) else np.zeros((0, size))


def overlap(first: Any, first_size: int, second: Any, second_size: int) -> bool:
    """Whether one of the first places shares a byte with one of the second."""
    away = np.subtract.outer(first, second)
    return bool(((away < second_size) & (away > -first_size)).any())


def spoil(memory: Any, targets: Any, size: int) -> None:
    """What lies at these places must not be looked at any more."""
    for at in targets.tolist():
        memory[at : at + size] = np.uint8(GARBAGE)
