"""Reads on their way into buffers of their owner: charged, traced, and ended before a buffer is used again."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashinfer.errors import StoreReadError
from flashinfer.io import DeviceReader, Extents, Pending, Reader
from flashinfer.io.reader import DeviceMemory
from flashinfer.ledger import Ledger


@dataclass(frozen=True, eq=False)
class Reading:
    """Reads submitted together; `number` is theirs in the trace."""

    pending: Pending
    number: int


class Reads:
    """Reads of one of the reader's files. `name` is what people call it."""

    def __init__(self, reader: Reader, file: int, name: str, ledger: Ledger) -> None:
        self._reader, self._file, self._name, self._ledger = reader, file, name, ledger
        self._under_way: list[Reading] = []

    def submit(self, extents: Extents, target: npt.NDArray[np.uint8], useful: int = 0) -> Reading:
        """Start reading, and charge it; `useful` of the bytes are wanted (0: the caller says so itself)."""
        number = self._ledger.submitted(self._name, extents.total, len(extents.offsets), useful)
        with self._ledger.submitting(self._name):
            pending = self._reader.submit(self._file, extents, target)
        return self._begun(pending, number)

    @property
    def reach_device(self) -> bool:
        """Whether there is `submit_to_device`."""
        return isinstance(self._reader, DeviceReader)

    def submit_to_device(self, extents: Extents, target: DeviceMemory, useful: int = 0) -> Reading:
        """As `submit`, straight to a device's memory (see `io.reader.DeviceReader`)."""
        assert isinstance(self._reader, DeviceReader)
        number = self._ledger.submitted(self._name, extents.total, len(extents.offsets), useful, to_device=True)
        with self._ledger.submitting(self._name):
            pending = self._reader.submit_to_device(self._file, extents, target)
        return self._begun(pending, number)

    def _begun(self, pending: Pending, number: int) -> Reading:
        self._under_way.append(Reading(pending, number))
        return self._under_way[-1]

    def wait(self, reading: Reading) -> None:
        """Block until they have ended. Raises StoreReadError where one of them failed."""
        try:
            with self._ledger.waiting(self._name, reading.number):
                reading.pending.wait()
        except StoreReadError:
            self._ended(reading)
            raise
        self._ended(reading)

    def settle(self, wanted: Reading | None = None) -> None:
        """Let all reads end but the wanted ones, those a step left behind that was abandoned too."""
        for reading in [r for r in self._under_way if r is not wanted]:
            with contextlib.suppress(StoreReadError):
                self.wait(reading)

    def _ended(self, reading: Reading) -> None:
        self._under_way.remove(reading)
        self._ledger.seen(self._name, reading.number)
