"""Copies between the host's memory and a device's, while both compute.

One engine for each backend whose device has memory of its own. Everything it does happens in the order in which it was
asked for, and may happen later than that: who needs a copy to have ended says so (`lead`, `wait`), who needs one to
begin late enough, too (`follow`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flashinfer.errors import DeviceError
from flashinfer.units import format_size

Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]
Memory = Any
"""Bytes of a device: what its backend's verbs take for `Bytes`. A slice is a view of the same bytes."""
Mark = Any
"""A moment in the order of the device's arithmetic."""


class Copies(Protocol):
    """The copies of one device.

    A call copies, for each i, `size` bytes from byte `sources[i]` of one memory to byte `targets[i]` of another; no two
    targets of a call overlap, nor a target and a source. Until it has ended (see `wait`) nobody may change what is
    copied from, nor look at or change what is copied to. Of host memory that is not pinned the host waits for copies.
    """

    overhead: int
    """Bytes of the device that its driver, libraries and allocator take beside what is asked of them."""

    def available(self) -> int:
        """Bytes of the device that this process may have, `overhead` among them."""
        ...

    def limit(self, size: int) -> None:
        """From now on all allocations together may take so many bytes, and fail beyond them."""
        ...

    def allocate(self, size: int) -> Memory:
        """Bytes of the device, zeros. They are given back with the last reference to them.

        Raises:
            DeviceError: they are not there.
        """
        ...

    def pin(self, memory: Bytes) -> None:
        """Hold this host memory in place until `close`, so that it can be copied from and to while the host goes on.

        Raises:
            DeviceError: the system does not let this process have so much memory in place.
        """
        ...

    def upload(self, memory: Memory, targets: Index, source: Bytes, sources: Index, size: int) -> int:
        """Host to device; returns how many transfers it takes, neighbours being one. Writes `memory`."""
        ...

    def download(self, target: Bytes, targets: Index, memory: Memory, sources: Index, size: int) -> int:
        """Device to host; returns as `upload`. Writes `target`."""
        ...

    def move(self, memory: Memory, targets: Index, sources: Index, size: int) -> None:
        """Within the device's memory. Writes `memory`."""
        ...

    def mark(self) -> Mark:
        """After all arithmetic that was asked for so far."""
        ...

    def follow(self, mark: Mark) -> None:
        """Copies asked for from now on begin after that moment."""
        ...

    def lead(self) -> None:
        """Arithmetic asked for from now on begins after all copies that were asked for so far."""
        ...

    def wait(self) -> None:
        """Block until all copies that were asked for so far have ended."""
        ...

    def close(self) -> None:
        """Let everything end, and go what is pinned. Idempotent."""
        ...


def runs(targets: Index, sources: Index, size: int) -> Iterator[tuple[int, int, int]]:
    """(target, source, bytes): the fewest transfers that keep the order, where both sides go on without a hole."""
    if not len(targets):
        return
    breaks = np.flatnonzero((np.diff(targets) != size) | (np.diff(sources) != size)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.append(starts, len(targets))) * size
    yield from zip(targets[starts].tolist(), sources[starts].tolist(), lengths.tolist(), strict=True)


class HostCopies:
    """See `Copies`: the twin, for a device whose memory is some of the host's. A copy has ended when its call returns.

    available: bytes it says there are.
    """

    def __init__(self, available: int) -> None:
        self.overhead = 0
        self._available, self._left = available, available

    def available(self) -> int:
        """See `Copies.available`."""
        return self._available

    def limit(self, size: int) -> None:
        """See `Copies.limit`."""
        self._left = size

    def allocate(self, size: int) -> Bytes:
        """See `Copies.allocate`."""
        if size > self._left:
            raise DeviceError(
                f"{format_size(size)} of device memory were asked for, {format_size(self._left)} are left"
            )
        self._left -= size
        return np.zeros(size, dtype=np.uint8)

    def pin(self, memory: Bytes) -> None:
        """Host memory stays where it is."""

    def upload(self, memory: Bytes, targets: Index, source: Bytes, sources: Index, size: int) -> int:
        """See `Copies.upload`."""
        return _copy(memory, targets, source, sources, size)

    def download(self, target: Bytes, targets: Index, memory: Bytes, sources: Index, size: int) -> int:
        """See `Copies.download`."""
        return _copy(target, targets, memory, sources, size)

    def move(self, memory: Bytes, targets: Index, sources: Index, size: int) -> None:
        """See `Copies.move`."""
        _copy(memory, targets, memory, sources, size)

    def mark(self) -> Mark:
        """Arithmetic has ended when its call returns."""
        return None

    def follow(self, mark: Mark) -> None:
        """As `mark`."""

    def lead(self) -> None:
        """All copies have ended."""

    def wait(self) -> None:
        """All copies have ended."""

    def close(self) -> None:
        """Nothing is under way."""


def _copy(target: Bytes, targets: Index, source: Bytes, sources: Index, size: int) -> int:
    count = 0
    for to, at, length in runs(targets, sources, size):
        target[to : to + length] = source[at : at + length]
        count += 1
    return count
