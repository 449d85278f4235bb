"""Weights on their way to a device that computes on memory of its own: what stays there, and what only passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Bundle, Copies
from flashinfer.ledger import Ledger
from flashinfer.model.arena import Arena, Bytes, DeviceArena
from flashinfer.model.weights import Ahead, Group, Need, no_guess

Index = npt.NDArray[np.int64]
Groups = Callable[[int, Need, Ahead], Iterator[Group]]


class Uploads:
    """Copies to the device, charged. What only passes goes through the two halves of the arena in turn.

    Arithmetic on one half goes on while the other is copied to. Invariant: a half is written to again only after all
    arithmetic that was asked for while it was the last one.
    """

    def __init__(self, copies: Copies, arena: DeviceArena, ledger: Ledger) -> None:
        self.arena, self._copies, self._ledger = arena, copies, ledger
        self.pin = copies.pin
        self._marks: list[Any] = [None, None]
        self._now = 0

    def put(self, targets: Index, source: Bytes, sources: Index, size: int) -> None:
        """Start copying `size` bytes from each of the sources to each of the targets, bytes of the arena."""
        with self._ledger.copying():
            transfers = self._copies.upload(self.arena.memory, targets, source, sources, size)
        self._ledger.copied(len(targets) * size, transfers)

    def fetch(self, target: Bytes, targets: Index, sources: Index, size: int) -> None:
        """Start copying `size` bytes from each of the sources, bytes of the arena, back to the host's memory."""
        with self._ledger.copying():
            transfers = self._copies.download(target, targets, self.arena.memory, sources, size)
        self._ledger.copied(len(targets) * size, transfers, back=True)

    def move(self, targets: Index, sources: Index, size: int) -> None:
        """Start copying within the arena."""
        with self._ledger.copying():
            self._copies.move(self.arena.memory, targets, sources, size)

    def follow(self) -> None:
        """What is copied from now on comes after all arithmetic that was asked for so far."""
        self._copies.follow(self._copies.mark())

    def turn(self) -> int:
        """Where the half begins that may be written to now, until the next turn."""
        self._marks[self._now] = self._copies.mark()
        self._now = 1 - self._now
        if self._marks[self._now] is not None:
            self._copies.follow(self._marks[self._now])
        return self.arena.halves[self._now]

    def passing(self, raw: Bytes) -> Any:
        """Memory of the device that has these bytes, at most a half of them, for arithmetic that is asked for before
        the next turn. The host's must stay until `wait`."""
        start = self.turn()
        self.put(np.array([start]), raw, np.array([0]), len(raw))
        self.lead()
        return self.arena.memory[start : start + len(raw)]

    def staying(self, at: int, raw: Bytes) -> None:
        """Copy these bytes to byte `at` of the arena, and wait until they are there."""
        self.put(np.array([at]), raw, np.array([0]), len(raw))
        self.wait()

    def lead(self) -> None:
        """Arithmetic asked for from now on has all copies asked for so far."""
        self._copies.lead()

    def close(self) -> None:
        """Let everything end, and drop the device's memory."""
        self.wait()
        self.arena.close()

    def wait(self) -> None:
        """Block until the host's bytes may be written to again."""
        with self._ledger.copying():
            self._copies.wait()


class UploadedNeurons:
    """A store of neurons whose bundles are copied to the device for each step (see `model.weights.Weights.neurons`),
    but for those that are there (`model.slots`).

    Of a group as many tiles as a half holds are computed at once, so groups here are parts of those there. One that is
    on the device already goes as it is, and is not waited for: who writes to the host's bytes next waits.
    """

    def __init__(self, inner: Groups, uploads: Uploads, arena: Arena, bundles: Sequence[Bundle]) -> None:
        self._inner, self._uploads, self._arena, self._bundles = inner, uploads, arena, bundles
        self._abandoned = False

    def groups(self, layer: int, need: Need, guess: Ahead = no_guess) -> Iterator[Group]:
        """See `model.weights.Weights.neurons`."""
        if self._abandoned:
            self._uploads.wait()  # it may have left some under way
        self._abandoned = True
        for group in self._inner(layer, need, guess):
            if group.memory is not self._arena.bytes:
                yield group
                continue
            yield from self._parts(group, self._bundles[layer].bytes)
            self._uploads.wait()
        self._abandoned = False

    def _parts(self, group: Group, size: int) -> Iterator[Group]:
        """The group's tiles on the device. size: bytes of a bundle."""
        step, host = self._uploads.arena.half // (group.offsets.shape[1] * size), len(self._arena.bytes)
        for first in range(0, len(group.offsets), step):
            offsets = group.offsets[first : first + step]
            needed = np.unique(offsets[(offsets > 0) & (offsets < host)])  # at 0 are zeros, here as there
            start = self._uploads.turn()
            self._uploads.put(start + np.arange(len(needed)) * size, self._arena.bytes, needed, size)
            self._uploads.lead()
            places = np.where(offsets > 0, start + np.searchsorted(needed, offsets) * size, 0)
            places = np.where(offsets < host, places, offsets - host)
            at = group.first + first
            index = group.index[first : first + step]
            yield Group(at, at + len(offsets), self._uploads.arena.memory, index, places)
