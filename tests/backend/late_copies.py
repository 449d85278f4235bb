"""A copy engine that does nothing before it must: who forgets to wait finds garbage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashinfer.backend.copies import HostCopies, runs

GARBAGE = 0xA5
"""As a float it is small, and not zero."""


class LateCopies(HostCopies):
    """As HostCopies, but copies are made when somebody waits for them; until then their targets hold garbage."""

    def __init__(self, available: int) -> None:
        super().__init__(available)
        self._asked: list[Callable[[], int]] = []

    def upload(self, memory: Any, targets: Any, source: Any, sources: Any, size: int) -> int:
        spoil(memory, targets, size)
        self._asked.append(lambda: super(LateCopies, self).upload(memory, targets, source, sources, size))
        return len(list(runs(targets, sources, size)))

    def download(self, target: Any, targets: Any, memory: Any, sources: Any, size: int) -> int:
        self._asked.append(lambda: super(LateCopies, self).download(target, targets, memory, sources, size))
        return len(list(runs(targets, sources, size)))

    def move(self, memory: Any, targets: Any, sources: Any, size: int) -> None:
        def moved() -> int:
            super(LateCopies, self).move(memory, targets, sources, size)
            return 0

        self._asked.append(moved)

    def lead(self) -> None:
        self.wait()

    def wait(self) -> None:
        asked, self._asked = self._asked, []
        for copy in asked:
            copy()

    def close(self) -> None:
        self.wait()


def spoil(memory: Any, targets: Any, size: int) -> None:
    """What lies at these places must not be looked at any more."""
    for at in targets.tolist():
        memory[at : at + size] = np.uint8(GARBAGE)
