"""Memory of a device, for readers that write to it: some of the host's that pretends to be, and a card's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.config import FILE_ALIGNMENT
from flashinfer.io import DeviceReader, Extents, Pending

Bytes = npt.NDArray[np.uint8]


class PretendedMemory:
    """The array's memory, as a device shows its own."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        shown = dict(self.array.__array_interface__)
        return {name: shown[name] for name in ("data", "shape", "strides", "typestr", "version")}

    def __getitem__(self, part: slice) -> PretendedMemory:
        return PretendedMemory(self.array[part])


class CardMemory:
    """A copy of the array on a card; `back` copies parts of it back."""

    def __init__(self, array: Any) -> None:
        import torch

        self.array = array
        self.there = torch.from_numpy(array).cuda()

    def back(self, extents: Extents) -> None:
        there = self.there.cpu().numpy()
        for place, length in zip(extents.targets, extents.lengths, strict=True):
            self.array[place : place + length] = there[place : place + length]


class AsHostReader:
    """A `DeviceReader` whose device memory is seen as the host's, so that it can be held to what every reader does.

    show: what a host array is on the device, and what brings its bytes back once they were read.
    """

    direct = True

    def __init__(self, reader: DeviceReader, show: Callable[[Any], tuple[Any, Callable[[Extents], None]]]) -> None:
        self._reader, self._show = reader, show
        self._returns: list[Callable[[], None]] = []
        self.note, self.stats, self.alignment = reader.note, reader.stats, FILE_ALIGNMENT

    def submit(self, file: int, extents: Extents, target: Bytes) -> Pending:
        there, back = self._show(target)
        pending = self._reader.submit_to_device(file, extents, there)
        self._returns.append(lambda: back(extents))
        return Returning(pending, self._returns[-1])

    def close(self) -> None:
        self._reader.close()
        for back in self._returns:
            back()


class Returning:
    """Reads to a device, whose bytes are brought back when they are waited for."""

    def __init__(self, pending: Pending, back: Callable[[], None]) -> None:
        self._pending, self._back = pending, back

    def wait(self) -> None:
        self._pending.wait()
        self._back()


def pretended(array: Any) -> tuple[Any, Callable[[Extents], None]]:
    """It is the same memory, so nothing has to be brought back."""
    return PretendedMemory(array), lambda _: None


def on_card(array: Any) -> tuple[Any, Callable[[Extents], None]]:
    """It is copied there, and back."""
    memory = CardMemory(array)
    return memory.there, memory.back
