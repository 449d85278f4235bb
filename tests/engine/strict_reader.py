"""A reader that forbids what must never happen: two reads in flight to the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flashinfer.io import Extents, MemoryReader


class StrictReader(MemoryReader):
    """As MemoryReader; `interrupt_at` is the wait (counted from now) that Ctrl-C strikes before the bytes are there."""

    interrupt_at: int | None = None

    def submit(self, file: int, extents: Extents, target: npt.NDArray[np.uint8]):
        for other in self._pending:
            assert other.done or not np.may_share_memory(other._target, target), "a read is in flight to these bytes"
        pending = super().submit(file, extents, target)
        pending.wait = self._interruptible(pending.wait)  # type: ignore[method-assign]
        return pending

    def _interruptible(self, wait: Callable[[], None]) -> Callable[[], None]:
        def waiting() -> None:
            if self.interrupt_at is not None:
                self.interrupt_at -= 1
                if self.interrupt_at < 0:
                    self.interrupt_at = None
                    raise KeyboardInterrupt
            wait()

        return waiting
