"""How far a long piece of work is, for whoever asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""


class Meter:
    """Counts the bytes that pass through and tells whoever asked. `done` follows them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
        """The same chunks; each counts when the next is asked for."""
        for chunk in chunks:
            yield chunk
            self.done += chunk.nbytes
            if self.progress is not None:
                self.progress(self.done, self.total)
