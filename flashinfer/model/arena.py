"""One buffer for everything a bundle of neurons can be in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashinfer.backend import Copies
from flashinfer.config import FILE_ALIGNMENT, LOAD_CHUNK
from flashinfer.io import AlignedBuffer
from flashinfer.memory import DevicePlan, Plan, dense_area, slot_area
from flashinfer.store import Geometry, Manifest
from flashinfer.store.geometry import round_up

Bytes = npt.NDArray[np.uint8]


class DeviceArena:
    """Memory of a device: a bundle of zeros, the slots of every layer, two halves that weights pass through, and the
    matrices that stay.

    Invariant: the size is the sum of the plan's figures.

    Attributes:
        memory: all of it; the bundle of zeros is at 0.
        slots: where the slots of each layer begin.
        halves, half: where they begin, and how large each is.
        matrices: where each matrix begins.
    """

    def __init__(self, manifest: Manifest, plan: DevicePlan, copies: Copies) -> None:
        at = round_up(max(layer.bundle_bytes for layer in manifest.layers), FILE_ALIGNMENT)
        self.slots: list[int] = []
        for layer, slots in zip(manifest.layers, plan.slots, strict=True):
            self.slots.append(at)
            at += slot_area(slots, layer.record_bytes)
        self.half, self.halves = plan.half, (at, at + plan.half)
        at += 2 * plan.half
        self.matrices: dict[str, int] = {}
        for name in sorted(plan.resident):
            self.matrices[name] = at
            at += dense_area(manifest.tensors[name].bytes)
        assert at == plan.weight_staging + plan.weight_resident + plan.weight_slots
        self.memory = copies.allocate(at)

    def close(self) -> None:
        """Drop the memory."""
        self.memory = None


class Arena:
    """A bundle of zeros (what padding points to), the slots of every layer, two halves of staging, two of guesses, the
    ring; and where there is a device a little more, so that what is loaded to it has a way through the buffers.

    So a bundle is a byte offset, wherever it is. Invariant: the size is the sum of the plan's figures.

    Attributes:
        bytes: all of it; the bundle of zeros is at 0.
        slots: where the slots of each layer begin.
        staging: where the first half of staging begins.
        guesses: where the first half for guesses begins.
        ring: where the ring of the stream begins.
        end: where the ring ends, which ends the arena where there is no device.
    """

    def __init__(self, manifest: Manifest, geometries: Sequence[Geometry], plan: Plan) -> None:
        at = round_up(max(layer.bundle_bytes for layer in manifest.layers), FILE_ALIGNMENT)
        self.slots: list[int] = []
        for geometry, slots in zip(geometries, plan.slots, strict=True):
            self.slots.append(at)
            at += slot_area(slots, geometry.record_bytes)
        self.staging = at
        self.guesses = at + 2 * plan.neuron_staging
        self.ring = self.guesses + 2 * plan.guess
        self.end = self.ring + plan.ring
        self._buffer = AlignedBuffer(self.end + (0 if plan.device is None else LOAD_CHUNK))
        self.bytes: Bytes = self._buffer.array

    def close(self) -> None:
        """Drop the memory; it goes with the last who can see it."""
        self.bytes = np.empty(0, dtype=np.uint8)
        self._buffer.close()
