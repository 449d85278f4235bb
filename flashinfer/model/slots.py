"""Slots of records, in the host's memory and on a device: where each is, and how records come there.

An address is a byte of the arena, or from its end on a byte of the device's, so that who looks for a record's bytes
need not ask which of the two has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Backend
from flashinfer.backend.bookkeeping import Bookkeeping
from flashinfer.cache import Change, Chosen, exchange
from flashinfer.config import FILE_ALIGNMENT
from flashinfer.io import RangePlan, plan_range
from flashinfer.ledger import Ledger
from flashinfer.memory import Plan
from flashinfer.model.arena import Arena
from flashinfer.model.reads import Reads
from flashinfer.model.uploads import Uploads
from flashinfer.model.weights import Group
from flashinfer.store import Geometry

Index = npt.NDArray[np.int64]


class Slots:
    """The slots of every layer. Of a layer's, the first `near` are on the device, the others in the arena.

    Attributes:
        near: how many of each layer's slots are on the device; none without one.
        total: how many slots each layer has.
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        plan: Plan,
        backend: Backend,
        arena: Arena,
        uploads: Uploads | None,
        ledger: Ledger,
    ) -> None:
        self._backend, self._arena, self._uploads, self._ledger = backend, arena, uploads, ledger
        self._sizes = [g.record_bytes for g in geometries]
        self._geometries = geometries
        self.near = plan.device.slots if plan.device is not None else (0,) * len(geometries)
        self.total = tuple(a + b for a, b in zip(self.near, plan.slots, strict=True))

    def address(self, layer: int, slots: Index) -> Index:
        """Where these slots begin."""
        size, near = self._sizes[layer], self.near[layer]
        far = self._arena.slots[layer] + (slots - near) * size
        if self._uploads is None or not near:
            return far
        there = len(self._arena.bytes) + self._uploads.arena.slots[layer] + slots * size
        return np.where(slots < near, there, far)

    def copy(self, layer: int, slots: Index, sources: Index) -> None:
        """Copy records at these addresses, of the arena, to these slots."""
        size, targets = self._sizes[layer], self.address(layer, slots)
        if self._uploads is not None:
            near = slots < self.near[layer]
            self._uploads.put(self._there(targets[near]), self._arena.bytes, sources[near], size)
            targets, sources = targets[~near], sources[~near]
            if len(targets):
                self._uploads.wait()  # what lay there may be on its way
        if len(targets):
            with self._ledger.copying():
                self._backend.copy(self._arena.bytes, targets, sources, size)

    def rearrange(self, layer: int, change: Change) -> None:
        """Carry out the moves of a change, before anything else of it. Of a device's slots, all arithmetic that was
        asked for so far comes before."""
        if not self.near[layer] or self._uploads is None:
            self.copy(layer, change.move_to, self.address(layer, change.move_from))
            return
        uploads, size = self._uploads, self._sizes[layer]
        uploads.follow()
        to, start = self.address(layer, change.move_to), self.address(layer, change.move_from)
        for up, down in exchange(change, self.near[layer], uploads.arena.half // size):
            aside = (uploads.turn() if up.stop > up.start else 0) + np.arange(up.stop - up.start) * size
            uploads.put(aside, self._arena.bytes, start[up], size)
            uploads.fetch(self._arena.bytes, to[down], self._there(start[down]), size)
            uploads.move(self._there(to[up]), aside, size)

    def passes(self, layer: int, records: int) -> bool:
        """Whether so many records pass to the device at once."""
        assert self._uploads is not None
        return records * self._sizes[layer] <= self._uploads.arena.half

    def group(self, layer: int, core: Bookkeeping, chosen: Chosen, records: Index, sources: Index) -> Group:
        """All tiles of a choice at once: near ones where they are, and these records, which are at these places of the
        arena, in a half of the device's memory."""
        uploads, size = self._uploads, self._sizes[layer]
        assert uploads is not None
        places = (uploads.turn() if len(records) else 0) + np.arange(len(records)) * size
        uploads.put(places, self._arena.bytes, sources, size)
        uploads.lead()
        tiles = core.tiles(chosen.neurons)
        offsets = core.offsets(tiles, uploads.arena.slots[layer], size, records, places)
        return Group(0, chosen.tiles, uploads.arena.memory, tiles, offsets)

    def load(self, layer: int, reads: Reads, alignment: int, max_extent: int) -> Index:
        """Fill the slots with the layer's first records, as far as they reach; slot i has record `load(...)[i]`.

        The arena's are read straight from the disk. What is on the device is read there, where the reader can, else it
        comes through the read buffers.
        """
        g, size = self._geometries[layer], self._sizes[layer]
        near, far = self.near[layer], self.total[layer] - self.near[layer]
        assert near + far <= g.records
        if far:
            plan = plan_range(g.offset, far * size, alignment=alignment, max_extent=max_extent)
            memory = self._arena.bytes[self._arena.slots[layer] :][: plan.extents.total]
            reads.wait(reads.submit(plan.extents, memory, far * size))
        if near and self._uploads is not None:
            if reads.reach_device:
                self._load_there(layer, self._uploads, reads, max_extent)
            else:
                self._load_through(layer, self._uploads, reads, alignment, max_extent)
        return np.concatenate((np.arange(far, far + near), np.arange(far)))

    def _load_through(self, layer: int, uploads: Uploads, reads: Reads, alignment: int, max_extent: int) -> None:
        """The device's slots of a layer by way of the read buffers."""
        buffer = self._arena.bytes[self._arena.staging :]
        for at, length, plan in self._parts(layer, uploads, len(buffer), alignment, max_extent):
            reads.wait(reads.submit(plan.extents, buffer[: plan.extents.total], length))
            uploads.staying(at, buffer[plan.place : plan.place + length])

    def _load_there(self, layer: int, uploads: Uploads, reads: Reads, max_extent: int) -> None:
        """The device's slots of a layer by way of its halves, which lie side by side and which nothing uses yet: a read
        is of whole pages, in which records begin anywhere."""
        start, room = uploads.arena.halves[0], 2 * uploads.arena.half
        buffer = uploads.arena.memory[start : start + room]
        uploads.wait()  # the memory is given out before its zeros are written
        for at, length, plan in self._parts(layer, uploads, room, FILE_ALIGNMENT, max_extent):
            reads.wait(reads.submit_to_device(plan.extents, buffer[: plan.extents.total], length))
            uploads.move(np.array([at]), np.array([start + plan.place]), length)
            uploads.wait()

    def _parts(
        self, layer: int, uploads: Uploads, room: int, alignment: int, max_extent: int
    ) -> Iterator[tuple[int, int, RangePlan]]:
        """The records of a layer that the device has slots for, as many at a time as are read to `room` bytes: the byte
        of its arena where they go, their bytes, and their reads."""
        g, size = self._geometries[layer], self._sizes[layer]
        first, end = self.total[layer] - self.near[layer], self.total[layer]
        at, step = uploads.arena.slots[layer], (room - 2 * alignment) // size
        for record in range(first, end, step):
            length = min(step, end - record) * size
            plan = plan_range(g.offset + record * size, length, alignment=alignment, max_extent=max_extent)
            yield at + (record - first) * size, length, plan

    def wait(self) -> None:
        """Block until the arena's bytes may be written to again."""
        if self._uploads is not None:
            self._uploads.wait()

    def _there(self, addresses: Index) -> Index:
        """Bytes of the device's arena."""
        return addresses - len(self._arena.bytes)
